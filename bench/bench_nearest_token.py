"""Nearest token: the kernel against its plain-torch reference, which stores all N x N similarities.

Ranks are by importance, so that a token has all the more important ones as candidates, or 0 and 1 for a kept half and
the rest. Shapes: keys of one head (D = 64) and tokens (D = 384) of DeiT-S at 224, keys at 384. Only the similarities
are compared: where two candidates are equal up to rounding, the positions may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from tokenprune_ext import ops
from tokenprune_ext.ops.nearest_token import reference

SHAPES = ((1, 197, 64), (8, 197, 64), (1, 197, 384), (8, 197, 384), (1, 577, 64), (8, 577, 64))


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in SHAPES:
        order = torch.rand(batch, tokens, device=device).argsort(1)
        for ranks, rank in (("importance", order), ("kept half", (order >= tokens // 2).long())):
            for dtype in (torch.float32, torch.bfloat16):
                metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
                yield Case(
                    op="nearest_token",
                    shape={"B": batch, "N": tokens, "D": channels, "RANKS": ranks},
                    dtype=dtype,
                    variants={
                        "kernel": lambda metric=metric, rank=rank: ops.nearest_token(metric, rank, 1)[0],
                        "reference": lambda metric=metric, rank=rank: reference(metric, rank, 1)[0],
                    },
                    bytes_moved=metric.numel() * metric.element_size() + rank.numel() * 20,
                    device=device,
                )


if __name__ == "__main__":
    main("nearest_token", __doc__, cases)
