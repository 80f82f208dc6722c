"""Merging of tokens: the kernel against its plain-torch reference and against index_add over all images at once.

Half of the patch tokens go into the other half.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import token_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.merge_tokens import reference

PREFIX = 1


def index_add(x: Tensor, size: Tensor, kept: Tensor, dropped: Tensor, match: Tensor) -> tuple[Tensor, ...]:
    """As one would write it in a model: multiply by the sizes, one index_add over batch and tokens, divide, log."""
    batch, tokens, channels = x.shape
    rows = PREFIX + kept.shape[1]
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    place = torch.zeros(batch, tokens, dtype=torch.int64, device=x.device)
    place.scatter_(1, kept, torch.arange(PREFIX, rows, device=x.device).expand(batch, -1))
    goal = (place.gather(1, match) + image * rows).flatten()
    source = (dropped + image * tokens).flatten()
    stay = torch.cat([torch.arange(PREFIX, device=x.device).expand(batch, -1), kept], 1)
    stay = (stay + image * tokens).flatten()
    weighted = (x.float() * size.unsqueeze(-1)).flatten(0, 1)
    sums = weighted[stay].index_add_(0, goal, weighted[source])
    sizes = size.flatten()[stay].index_add_(0, goal, size.flatten()[source])
    mean = (sums / sizes.unsqueeze(-1)).to(x.dtype)
    log_sizes = sizes.log().to(x.dtype).view(batch, 1, 1, rows)
    return mean.view(batch, rows, channels), sizes.view(batch, rows), log_sizes


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in token_shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(batch, tokens, channels, device=device).to(dtype)
            size = torch.randint(1, 5, (batch, tokens), device=device).float()
            order = torch.rand(batch, tokens - PREFIX, device=device).argsort(1) + PREFIX
            keep = (tokens - PREFIX) // 2
            kept, dropped = order[:, :keep].sort(1).values, order[:, keep:].sort(1).values
            match = kept.gather(1, torch.randint(keep, dropped.shape, device=device))
            args = (x, size, kept, dropped, match)
            yield Case(
                op="merge_tokens",
                shape={"B": batch, "N": tokens, "C": channels},
                dtype=dtype,
                variants={
                    "kernel": lambda args=args: ops.merge_tokens(*args, PREFIX),
                    "reference": lambda args=args: reference(*args, PREFIX),
                    "index_add": lambda args=args: index_add(*args),
                },
                bytes_moved=batch * (tokens + PREFIX + keep) * channels * x.element_size(),
                tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                device=device,
            )


if __name__ == "__main__":
    main("merge_tokens", __doc__, cases)
