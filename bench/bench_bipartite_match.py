"""Bipartite matching: the kernel against its plain-torch reference, which stores the similarities between the groups.

A quarter of the tokens is dropped. Only the similarities of the chosen pairs are compared: where two are equal up to
rounding, the choices may differ. Cases with H have the keys of all heads, as views of a packed qkv tensor of DeiT-S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes, metric_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.bipartite_match import reference

DEIT_S = (6, 197)


def _similarities(metric: Tensor, dropped: Tensor, match: Tensor) -> Tensor:
    """Of the chosen pairs, each image's in ascending order."""
    metric = metric if metric.dim() == 3 else metric.float().sum(1)
    pairs = [
        metric.gather(1, index.unsqueeze(-1).expand(-1, -1, metric.shape[-1])).float() for index in (dropped, match)
    ]
    return F.cosine_similarity(*pairs, dim=-1).sort(1).values


def _case(metric: Tensor, sizes: dict[str, int], partition: str, scores: Tensor | None) -> Case:
    batch, tokens, channels = sizes["B"], sizes["N"], sizes["D"]
    r = tokens // 4
    half = (tokens - 1) // 2  # group B; an odd token goes to A
    args = (metric, scores, r, 1, partition)
    return Case(
        op="bipartite_match",
        shape={**sizes, "PARTITION": partition},
        dtype=metric.dtype,
        variants={"kernel": lambda: ops.bipartite_match(*args), "reference": lambda: reference(*args)},
        bytes_moved=metric.numel() * metric.element_size() + batch * (tokens - 1 + r) * 8,
        flops=2 * batch * half * (tokens - 1 - half) * channels,
        compared=lambda result: _similarities(metric, *result[:2]),
        device=metric.device.type,
    )


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in metric_shapes(device):
        importance = torch.rand(batch, tokens, device=device)
        for partition, scores in (("alternate", None), ("unimportant", importance)):
            for dtype in (torch.float32, torch.bfloat16):
                metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
                yield _case(metric, {"B": batch, "N": tokens, "D": channels}, partition, scores)
    for batch, heads, tokens in attention_shapes(device):
        if (heads, tokens) != DEIT_S:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
            sizes = {"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM}
            yield _case(qkv.permute(2, 0, 3, 1, 4)[1], sizes, "alternate", None)


if __name__ == "__main__":
    main("bipartite_match", __doc__, cases)
