"""Tokens that are important and unlike any more important one, and where the others belong (Peaks)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype, allow_tf32, check_floating, widened
from ._define import define
from ._select import ranked, split
from ._similarity import all_pairs_macs, check_metric
from .nearest_token import reference as nearest_token

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(metric: Tensor, importance: Tensor, keep: int, num_prefix: int, exponent: float) -> None:
    check_metric(metric, "cosine")
    check_floating("importance", importance, "[B, N]")
    if importance.shape != metric.shape[:2]:
        raise ValueError(f"importance must have shape {list(metric.shape[:2])} to go with metric {list(metric.shape)}, "
                         f"got {list(importance.shape)}")  # fmt: skip
    if importance.dtype != accumulate_dtype(metric.dtype):
        raise TypeError(f"importance must be {accumulate_dtype(metric.dtype)} for metric of {metric.dtype}, "
                        f"got {importance.dtype}")  # fmt: skip
    if importance.device != metric.device:
        raise ValueError(f"importance must be on the device of metric, {metric.device}, got {importance.device}")
    check_int("num_prefix", num_prefix, 0, metric.shape[1], "the number of tokens")
    check_int("keep", keep, 1, metric.shape[1] - num_prefix, "the number of patch tokens")
    if not 0 < exponent < math.inf:
        raise ValueError(f"exponent must be positive and finite, got {exponent}")


def _ranks(importance: Tensor, num_prefix: int) -> Tensor:
    """0 for the most important patch token, and so on, int64 ``[B, N]``; equal importance: the lower position."""
    order = ranked(importance, num_prefix)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(importance, dtype=torch.int64).scatter(1, order, places)


def reference(
    metric: Tensor,
    importance: Tensor,
    keep: int,
    num_prefix: int = 0,
    exponent: float = 1.0,
    allow_tf32: bool = False,
) -> Results:
    """The operator in plain torch, by way of all similarities [B, N, N]."""
    _check(metric, importance, keep, num_prefix, exponent)
    near, _ = nearest_token(metric, _ranks(importance, num_prefix), num_prefix)
    score = importance.contiguous() ** exponent * (1 - near)
    score = torch.where(torch.arange(score.shape[1], device=score.device) < num_prefix, 0.0, score)
    kept, dropped = split(score, keep, num_prefix)
    group = torch.ones_like(importance, dtype=torch.int64).scatter(1, kept, 0)
    match = nearest_token(metric, group, num_prefix)[1].gather(1, dropped)
    return score, kept, dropped, torch.where(match < 0, dropped, match)


def _fake(
    metric: Tensor,
    importance: Tensor,
    keep: int,
    num_prefix: int = 0,
    exponent: float = 1.0,
    allow_tf32: bool = False,
) -> Results:
    _check(metric, importance, keep, num_prefix, exponent)
    batch, tokens = importance.shape
    dropped, match = (importance.new_empty((batch, tokens - num_prefix - keep), dtype=torch.int64) for _ in range(2))
    return importance.new_empty((batch, tokens)), importance.new_empty((batch, keep), dtype=torch.int64), dropped, match


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("peaks_match chooses tokens and has no gradient")


def _macs(given: Mapping[str, Any]) -> int:
    """Both searches: among the more important tokens, and among those that stay."""
    batch, tokens, channels = given["metric"]
    keep = given["keep"]
    return all_pairs_macs(given) + batch * channels * keep * (tokens - given["num_prefix"] - keep)


_op = define(
    "peaks_match(Tensor metric, Tensor importance, int keep, int num_prefix=0, float exponent=1.0, "
    "bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=_macs,
)


def peaks_match(metric: Tensor, importance: Tensor, keep: int, num_prefix: int = 0, exponent: float = 1.0) -> Results:
    """Keep the patch tokens with the highest ``importance ** exponent * (1 - near)``, and match the others with them.

    ``near`` is the largest cosine similarity to a more important patch token, -1 for the most important one. Every
    token that is not kept is matched with the most similar kept one. No N x N matrix is stored: on the CPU up to 1024
    patch tokens a thread keeps the similarities of one image, so that none is computed twice.

    Equal importance, scores or similarities: the lower position comes first. NaN importance is the least, NaN scores
    are the lowest. A token with NaN, an infinity or a norm beyond the range of the sums' dtype is similar to nothing.
    Carries no gradient. On a GPU, products of float32 tensors use tf32 when torch's own do
    (``torch.backends.cuda.matmul.fp32_precision``); norms do not.

    Args:
        metric: what is compared, e.g. tokens, ``[B, N, D]``; float16, bfloat16, float32 or float64.
        importance: ``[B, N]``, any floating dtype; the entries of the prefix tokens are ignored.
        keep: patch tokens to keep, 1..N - ``num_prefix``.
        num_prefix: prefix tokens (class, distillation, registers) in front; they take part in nothing.
        exponent: weight of importance against diversity, positive.

    Returns:
        ``(score, kept, dropped, match)``: ``score`` ``[B, N]``, float32 (float64 when ``metric`` is), 0 for prefix
        tokens; int64 positions ``kept`` ``[B, keep]`` and ``dropped`` ``[B, N - num_prefix - keep]``, ascending; and
        ``match``, for each of ``dropped`` the position of its kept token, or its own where it is similar to none.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together or are empty, ``keep`` or ``num_prefix`` is out of range, or ``exponent``
            is not positive.

    Source: this project, see ``methods.Peaks``.
    """
    return _op(metric, widened(importance, metric), keep, num_prefix, exponent, allow_tf32(metric))
