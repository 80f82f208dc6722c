"""Nearest token: the kernel against its plain-torch reference, which stores all N x N similarities.

Ranks are by importance, so that a token has all the more important ones as candidates, or 0 and 1 for a kept half and
the rest. Only the similarities are compared: where two candidates are equal up to rounding, the positions may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import metric_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.nearest_token import reference

PREFIX = 1


def _candidates(rank: Tensor) -> int:
    """How many pairs there are of a token and one of lower rank."""
    ordered = rank.sort(1).values
    return int(torch.searchsorted(ordered, ordered).sum())


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in metric_shapes(device):
        order = torch.rand(batch, tokens).argsort(1)  # on the CPU, where pairs are counted
        half = (order >= tokens // 2).long()
        for ranks, rank in (("importance", order), ("kept half", half)):
            pairs, rank = _candidates(rank[:, PREFIX:]), rank.to(device)
            for dtype in (torch.float32, torch.bfloat16):
                metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
                yield Case(
                    op="nearest_token",
                    shape={"B": batch, "N": tokens, "D": channels, "RANKS": ranks},
                    dtype=dtype,
                    variants={
                        "kernel": lambda metric=metric, rank=rank: ops.nearest_token(metric, rank, PREFIX)[0],
                        "reference": lambda metric=metric, rank=rank: reference(metric, rank, PREFIX)[0],
                    },
                    bytes_moved=metric.numel() * metric.element_size() + rank.numel() * 20,
                    flops=2 * channels * pairs,  # a tile in which nothing is a candidate need not be formed
                    device=device,
                )


if __name__ == "__main__":
    main("nearest_token", __doc__, cases)
