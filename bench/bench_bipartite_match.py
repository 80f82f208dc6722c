"""Bipartite matching: the kernel against its plain-torch reference, which stores the similarities between the groups.

A quarter of the tokens is dropped. Only the similarities of the chosen pairs are compared: where two are equal up to
rounding, the choices may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main
from shapes import metric_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.bipartite_match import reference


def _similarities(metric: Tensor, dropped: Tensor, match: Tensor) -> Tensor:
    """Of the chosen pairs, each image's in ascending order."""
    pairs = [
        metric.gather(1, index.unsqueeze(-1).expand(-1, -1, metric.shape[-1])).float() for index in (dropped, match)
    ]
    return F.cosine_similarity(*pairs, dim=-1).sort(1).values


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in metric_shapes(device):
        importance = torch.rand(batch, tokens, device=device)
        r = tokens // 4
        half = (tokens - 1) // 2  # group B; an odd token goes to A
        for partition, scores in (("alternate", None), ("unimportant", importance)):
            for dtype in (torch.float32, torch.bfloat16):
                metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
                args = (metric, scores, r, 1, partition)
                yield Case(
                    op="bipartite_match",
                    shape={"B": batch, "N": tokens, "D": channels, "PARTITION": partition},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.bipartite_match(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    bytes_moved=metric.numel() * metric.element_size() + batch * (tokens - 1 + r) * 8,
                    flops=2 * batch * half * (tokens - 1 - half) * channels,
                    compared=lambda result, metric=metric: _similarities(metric, *result[:2]),
                    device=device,
                )


if __name__ == "__main__":
    main("bipartite_match", __doc__, cases)
