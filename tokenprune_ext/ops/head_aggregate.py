"""From scores of every head to one score a token (Zero-TPrune, section 3.2: VHF and EIR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype, check_floating
from ._define import define


def _check(scores: Tensor, vmin: float, vmax: float, num_prefix: int) -> None:
    check_floating("scores", scores, "[B, H, N]")
    heads, tokens = scores.shape[1:]
    if heads < 1 or tokens < 1:
        raise ValueError(f"scores must have at least one head and one token, got shape {list(scores.shape)}")
    if not vmin <= vmax:
        raise ValueError(f"vmin must not be above vmax, got vmin={vmin} and vmax={vmax}")
    check_int("num_prefix", num_prefix, 0, tokens - 1, "at least one patch token must be left")


def _kept_heads(patches: Tensor, vmin: float, vmax: float) -> Tensor:
    """Variance-based head filter: 1 for the heads that count, [B, H, 1]; all of them when none passes."""
    variance = (patches - patches.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    keep = (vmin <= variance) & (variance <= vmax)
    return (keep | ~keep.any(1, keepdim=True)).to(patches.dtype)


def reference(scores: Tensor, vmin: float = 0.01, vmax: float = 0.7, num_prefix: int = 0) -> Tensor:
    """The operator in plain torch."""
    _check(scores, vmin, vmax, num_prefix)
    patches = scores[..., num_prefix:].to(accumulate_dtype(scores.dtype))
    keep = _kept_heads(patches, vmin, vmax)
    # A head that is filtered out must not reach the sum, not even as 0 * NaN.
    squares = torch.where(keep > 0, patches * patches, 0.0)
    combined = (squares.sum(1) / keep.sum(1)).sqrt()
    return torch.nn.functional.pad(combined, (num_prefix, 0))


def _fake(scores: Tensor, vmin: float = 0.01, vmax: float = 0.7, num_prefix: int = 0) -> Tensor:
    _check(scores, vmin, vmax, num_prefix)
    return scores.new_empty((scores.shape[0], scores.shape[-1]), dtype=accumulate_dtype(scores.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, ctx.vmin, ctx.vmax, ctx.num_prefix = inputs
    ctx.save_for_backward(scores, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """The filter is a constant; a token whose score is 0 gets the gradient 0."""
    scores, output = ctx.saved_tensors
    patches = scores[..., ctx.num_prefix :].to(grad.dtype)
    combined = output[:, ctx.num_prefix :]
    keep = _kept_heads(patches, ctx.vmin, ctx.vmax)
    slope = torch.where(combined > 0, grad[:, ctx.num_prefix :] / combined, 0.0) / keep.sum(1)
    grad_patches = torch.where(keep > 0, patches * slope.unsqueeze(1), 0.0)
    return torch.nn.functional.pad(grad_patches, (ctx.num_prefix, 0)).to(scores.dtype), None, None, None


_op = define(
    "head_aggregate(Tensor scores, float vmin=0.01, float vmax=0.7, int num_prefix=0) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def head_aggregate(scores: Tensor, vmin: float = 0.01, vmax: float = 0.7, num_prefix: int = 0) -> Tensor:
    """Combine per-head scores: variance-based head filter (VHF), then root mean square over the heads left (EIR).

    A head counts when the variance of its scores over the patch tokens lies in ``[vmin, vmax]``; when no head of an
    image passes, all count.

    Args:
        scores: scores on the mean-1 scale (see :func:`wpr`), ``[B, H, N]``; any floating dtype.
        vmin: smallest variance that passes (population variance, over the patch tokens alone).
        vmax: largest variance that passes.
        num_prefix: prefix tokens in front; they have no part in the variance and their entries of the result are 0.

    Returns:
        One score a token, ``[B, N]``, float32 (float64 when ``scores`` is). A head with a NaN among its patch tokens
        fails the filter; when every head fails, NaN propagates.

    Raises:
        TypeError: ``scores`` is no tensor, or has an unsupported dtype.
        ValueError: ``scores`` is not ``[B, H, N]``, ``vmin`` is above ``vmax``, or ``num_prefix`` is not in 0..N-1.

    Source: Zero-TPrune (CVPR 2024), section 3.2, emphasising informative region and variance-based head filter.
    """
    return _op(scores, vmin, vmax, num_prefix)
