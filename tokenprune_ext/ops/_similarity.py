"""Similarity of two tokens as the matching operators define it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice

from ._check import accumulate_dtype, allow_tf32, check_floating

SIMILARITIES = ("cosine", "dot", "euclidean")

# Shorter vectors are divided by this instead of their norm, as in torch.nn.functional.normalize: zeros stay zeros.
MIN_NORM = 1e-12


def check_metric(metric: object, similarity: str, heads: bool = False) -> None:
    """``metric`` is ``[B, N, D]``, or with ``heads`` also ``[B, H, N, D]``, with at least one of each but images;
    ``similarity`` is one of ``SIMILARITIES``."""
    check_floating("metric", metric, "[B, N, D] or [B, H, N, D]" if heads else "[B, N, D]")
    assert isinstance(metric, Tensor)
    if min(metric.shape[1:]) < 1:
        needs = "one token and one channel" if metric.dim() == 3 else "one head, one token and one channel"
        raise ValueError(f"metric must have at least {needs}, got shape {list(metric.shape)}")
    check_choice("similarity", similarity, SIMILARITIES)


def sum_heads(metric: Tensor) -> Tensor:
    """``[B, N, D]``: of ``[B, H, N, D]`` the sum over the heads, in the dtype that sums are formed in."""
    return metric if metric.dim() == 3 else metric.to(accumulate_dtype(metric.dtype)).sum(1)


def compared_rows(metric: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Rows of ``metric`` as they are compared, over their norms for ``cosine``, and the norms ``[B, N, 1]``.

    Both are in the dtype that sums are formed in. A row whose norm leaves its range, or for ``euclidean`` whose
    distance to another could, becomes NaN: it is similar to nothing.
    """
    wide = metric.to(accumulate_dtype(metric.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    finite = (2 * norm).square().isfinite() if similarity == "euclidean" else norm.isfinite()
    rows = wide / norm.clamp_min(MIN_NORM) if similarity == "cosine" else wide
    return rows.masked_fill(~finite, math.nan), norm


def pairwise(left: Tensor, right: Tensor, similarity: str) -> Tensor:
    """``[B, I, J]`` from two parts of :func:`compared_rows`, ``[B, I, D]`` and ``[B, J, D]``."""
    product = left @ right.mT
    if similarity != "euclidean":
        return product
    return product - right.square().sum(-1).unsqueeze(1) / 2 - left.square().sum(-1, keepdim=True) / 2


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, K]`` of ``x`` ``[B, N, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def tf32_allowed(metric: Tensor, similarity: str) -> bool:
    """A distance is a small difference of products and norms: rounding the products alone would drown it."""
    return similarity != "euclidean" and allow_tf32(metric)


def all_pairs_macs(given: Mapping[str, Any]) -> int:
    """MACs of comparing every pair of patch tokens once: the most there can be, whatever the ranks are."""
    batch, tokens, channels = given["metric"]
    patches = tokens - given["num_prefix"]
    return batch * channels * (patches * (patches - 1) // 2)
