"""The most similar token among those of lower rank (Peaks: among the more important; ToMe: in the other group)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype
from ._define import define
from ._similarity import MIN_NORM, all_pairs_macs, check_metric, compared_rows, pairwise, take_rows, tf32_allowed


def _check(metric: Tensor, rank: Tensor, num_prefix: int, similarity: str) -> None:
    check_metric(metric, similarity)
    if not isinstance(rank, Tensor):
        raise TypeError(f"rank must be a torch.Tensor [B, N], got {type(rank).__name__}")
    if rank.dtype != torch.int64:
        raise TypeError(f"rank must have dtype int64, got {rank.dtype}")
    if rank.shape != metric.shape[:2]:
        raise ValueError(f"rank must have shape {list(metric.shape[:2])} to go with metric {list(metric.shape)}, "
                         f"got {list(rank.shape)}")  # fmt: skip
    if rank.device != metric.device:
        raise ValueError(f"rank must be on the device of metric, {metric.device}, got {rank.device}")
    check_int("num_prefix", num_prefix, 0, metric.shape[1], "the number of tokens")


def reference(
    metric: Tensor, rank: Tensor, num_prefix: int = 0, similarity: str = "cosine", allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """The operator in plain torch, by way of all similarities [B, N, N]."""
    _check(metric, rank, num_prefix, similarity)
    rows, _ = compared_rows(metric, similarity)
    pairs = pairwise(rows, rows, similarity)
    patch = torch.arange(metric.shape[1], device=metric.device) >= num_prefix
    candidate = (rank.unsqueeze(1) < rank.unsqueeze(2)) & patch & patch.unsqueeze(1) & ~pairs.isnan()
    best, index = pairs.masked_fill(~candidate, -math.inf).max(2)  # the first of equal ones
    found = candidate.any(2)
    return torch.where(found, best, -1.0), torch.where(found, index, -1)


def _fake(
    metric: Tensor, rank: Tensor, num_prefix: int = 0, similarity: str = "cosine", allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    _check(metric, rank, num_prefix, similarity)
    shape = tuple(metric.shape[:2])
    return metric.new_empty(shape, dtype=accumulate_dtype(metric.dtype)), metric.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(inputs[0], index)
    ctx.similarity = inputs[3]


def _sum_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Row i goes to place ``index[i]``; what meets there is added, in the same order every time."""
    if not rows.is_cuda:
        return torch.zeros_like(rows).scatter_add(1, index.unsqueeze(-1).expand_as(rows), rows)
    # There scatter_add has atomics; index_put sorts.
    batch = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    return torch.zeros_like(rows).index_put((batch, index), rows, accumulate=True)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    metric, index = ctx.saved_tensors
    rows, norm = compared_rows(metric, ctx.similarity)
    finite = rows.isfinite()
    rows = torch.where(finite, rows, 0)  # NaN rows take part in no pair
    share = torch.where(index >= 0, grad, 0).unsqueeze(-1)
    index = index.clamp_min(0)
    partner = take_rows(rows, index)
    if ctx.similarity == "euclidean":  # the two of a pair pull each other along the line between them
        pull = share * (partner - rows)
        grad_metric = pull - _sum_rows(pull, index)
    else:
        grad_metric = share * partner + _sum_rows(share * rows, index)
    if ctx.similarity == "cosine":
        # Through x / norm only what is perpendicular to x changes the direction; a clamped norm is a constant.
        along = torch.where(norm > MIN_NORM, (grad_metric * rows).sum(-1, keepdim=True), 0)
        grad_metric = (grad_metric - along * rows) / norm.clamp_min(MIN_NORM)
    return torch.where(finite, grad_metric, 0).to(metric.dtype), None, None, None, None


_op = define(
    'nearest_token(Tensor metric, Tensor rank, int num_prefix=0, str similarity="cosine", '
    "bool allow_tf32=False) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=all_pairs_macs,
)


def nearest_token(
    metric: Tensor, rank: Tensor, num_prefix: int = 0, similarity: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """For every patch token the most similar patch token of lower rank. No N x N matrix is stored.

    Token j is a candidate of token i when ``rank[j] < rank[i]``. Ranks by importance, the most important 0, leave
    every token the more important ones; ranks 0 for kept and 1 for other tokens leave the others the kept ones.

    Equal similarities: the lower position wins. A zero vector has cosine 0 to everything. A token with NaN, an infinity
    or a squared norm (``euclidean``: four times it) beyond the range of the sums' dtype is nobody's candidate and has
    none. The similarity has a gradient, through the chosen pair; rank has none. Where two candidates are equally
    similar up to rounding, devices may choose differently. On a GPU, products of float32 tensors use tf32 when
    torch's own do (``torch.backends.cuda.matmul.fp32_precision``), but for ``euclidean``; norms do not.

    Args:
        metric: what is compared, e.g. keys or tokens, ``[B, N, D]``; float16, bfloat16, float32 or float64.
        rank: int64 ``[B, N]``; any values. The entries of the prefix tokens are ignored.
        num_prefix: prefix tokens (class, distillation, registers) in front; they take part in no pair.
        similarity: ``cosine``; ``dot``, the product itself; ``euclidean``, minus half the squared distance, formed as
            ``x . y - |x|^2 / 2 - |y|^2 / 2``: its rounding is that of the squared norms.

    Returns:
        ``(similarity, index)``: both ``[B, N]``; the similarity, float32 (float64 when ``metric`` is), and the position
        of the token it belongs to, int64. Without a candidate they are -1 and -1.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together or are empty, ``num_prefix`` is out of range, or ``similarity`` is
            unknown.

    Source: ToMe (ICLR 2023), section 3; Zero-TPrune (CVPR 2024), section 3.3.
    """
    return _op(metric, rank, num_prefix, similarity, tf32_allowed(metric, similarity))
