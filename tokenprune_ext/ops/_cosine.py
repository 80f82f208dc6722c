"""Cosine similarity as the matching operators define it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import accumulate_dtype, check_floating

# Shorter vectors are divided by this instead of their norm, as in torch.nn.functional.normalize: zeros stay zeros.
MIN_NORM = 1e-12


def check_metric(metric: object) -> None:
    """``metric`` is ``[B, N, D]`` with at least one token and one channel."""
    check_floating("metric", metric, "[B, N, D]")
    assert isinstance(metric, Tensor)
    if metric.shape[1] < 1 or metric.shape[2] < 1:
        raise ValueError(f"metric must have at least one token and one channel, got shape {list(metric.shape)}")


def unit_vectors(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``metric`` over their norms, and the norms ``[B, N, 1]``, in the dtype that sums are formed in.

    A row whose norm is not finite becomes NaN: it is similar to nothing.
    """
    wide = metric.to(accumulate_dtype(metric.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.clamp_min(MIN_NORM)).masked_fill(~norm.isfinite(), math.nan), norm


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, K]`` of ``x`` ``[B, N, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
