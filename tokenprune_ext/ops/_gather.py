"""Operators that copy the prefix tokens and some patch tokens: their checks, the copy and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int

from ._check import check_floating
from ._similarity import take_rows


def check_selection(x: Tensor, scores: Tensor, keep: int, num_prefix: int) -> None:
    """``x`` ``[B, N, C]`` and ``scores`` ``[B, N]``, with ``keep`` of the patch tokens to stay."""
    check_floating("x", x, "[B, N, C]")
    check_floating("scores", scores, "[B, N]")
    if scores.shape != x.shape[:2]:
        raise ValueError(f"scores must have shape {list(x.shape[:2])} to go with x {list(x.shape)}, "
                         f"got {list(scores.shape)}")  # fmt: skip
    if scores.device != x.device:
        raise ValueError(f"scores must be on the device of x, {x.device}, got {scores.device}")
    check_int("num_prefix", num_prefix, 0, x.shape[1], "the number of tokens")
    check_int("keep", keep, 1, x.shape[1] - num_prefix, "the number of patch tokens")


def kept_rows(x: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """The prefix tokens of ``x`` ``[B, N, C]`` and those at ``kept`` ``[B, K]``; ``[B, num_prefix + K, C]``."""
    return torch.cat([x[:, :num_prefix], take_rows(x, kept)], 1)


def kept_rows_gradient(grad: Tensor, kept: Tensor, num_prefix: int, tokens: int) -> Tensor:
    """The gradient with respect to the ``tokens`` that rows were taken of, 0 where none was."""
    batch, _, channels = grad.shape
    index = kept.unsqueeze(-1).expand(-1, -1, channels)
    spread = grad.new_zeros((batch, tokens, channels)).scatter(1, index, grad[:, num_prefix:])
    return torch.cat([grad[:, :num_prefix], spread[:, num_prefix:]], 1)
