"""Weighted page rank of the attention graph (Zero-TPrune, section 3.2: the importance stage)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype, check_attention, widened
from ._define import define


def check_iteration(
    name: str, of: Tensor, start: Tensor | None, max_iters: int, tol: float, ranked: int | None = None
) -> None:
    """The arguments of the iteration fit ``of``, ``[B, H, N, ...]``, which the messages call ``name``; ``ranked`` when
    only so many of its tokens take part."""
    check_int("max_iters", max_iters, 0)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if start is None:
        return
    if not isinstance(start, Tensor):
        raise TypeError(f"start must be a torch.Tensor [N] or [B, H, N] or None, got {type(start).__name__}")
    batch, heads, tokens = of.shape[:3]
    tokens = tokens if ranked is None else ranked
    if tuple(start.shape) not in ((tokens,), (batch, heads, tokens)):
        some = "" if ranked is None else f", of which {ranked} tokens are ranked"
        raise ValueError(
            f"start must have shape [{tokens}] or [{batch}, {heads}, {tokens}] to go with {name} {list(of.shape)}"
            f"{some}, got {list(start.shape)}"
        )
    if start.dtype != accumulate_dtype(of.dtype):
        raise TypeError(f"start must be {accumulate_dtype(of.dtype)} for {name} of {of.dtype}, got {start.dtype}")
    if start.device != of.device:
        raise ValueError(f"start must be on the device of {name}, {of.device}, got {start.device}")


def _check(attn: Tensor, start: Tensor | None, max_iters: int, tol: float) -> None:
    check_attention(attn)
    check_iteration("attn", attn, start, max_iters, tol)


def _first(attn: Tensor, start: Tensor | None) -> Tensor:
    """The scores before the first iteration, [B, H, N], never a view of ``start``."""
    scores = attn.new_ones(attn.shape[:3], dtype=accumulate_dtype(attn.dtype))
    return scores if start is None else scores * start


def _iterate(
    attn: Tensor, start: Tensor | None, max_iters: int, tol: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The final scores, and for every iteration the scores it began with and which heads it still moved.

    No early exit: a converged head is held still, so the host never waits for the device.
    """
    scores = _first(attn, start)
    active = torch.ones_like(scores[..., :1], dtype=torch.bool)
    steps = []
    for _ in range(max_iters):
        steps.append((scores, active))
        new = torch.where(active, torch.matmul(scores.unsqueeze(-2), attn).squeeze(-2), scores)
        active = active & ~((new - scores).abs().sum(-1, keepdim=True) <= tol * attn.shape[-1])
        scores = new
    return scores, steps


def reference(attn: Tensor, start: Tensor | None = None, max_iters: int = 30, tol: float = 1e-6) -> Tensor:
    """The operator in plain torch."""
    _check(attn, start, max_iters, tol)
    return _iterate(attn.to(accumulate_dtype(attn.dtype)), start, max_iters, tol)[0]


def _fake(attn: Tensor, start: Tensor | None = None, max_iters: int = 30, tol: float = 1e-6) -> Tensor:
    _check(attn, start, max_iters, tol)
    return attn.new_empty(attn.shape[:3], dtype=accumulate_dtype(attn.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attn, start, ctx.max_iters, ctx.tol = inputs
    ctx.save_for_backward(attn, start)


def wpr_gradient(
    wide: Tensor, start: Tensor | None, grad: Tensor, max_iters: int, tol: float
) -> tuple[Tensor, Tensor | None]:
    """Reverse of ``s <- A^T s``: ``g <- A g``, and every step adds ``s g^T`` to the gradient of A, ``wide``."""
    _, steps = _iterate(wide, start, max_iters, tol)
    grad_attn = torch.zeros_like(wide)
    for scores, active in reversed(steps):
        flowing = torch.where(active, grad, 0.0)
        grad_attn = grad_attn + scores.unsqueeze(-1) * flowing.unsqueeze(-2)
        grad = torch.where(active, torch.matmul(wide, grad.unsqueeze(-1)).squeeze(-1), grad)
    grad_start = None
    if start is not None:
        grad_start = grad.sum((0, 1)) if start.dim() == 1 else grad
    return grad_attn, grad_start


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    attn, start = ctx.saved_tensors
    grad_attn, grad_start = wpr_gradient(attn.to(grad.dtype), start, grad, ctx.max_iters, ctx.tol)
    return grad_attn.to(attn.dtype), grad_start, None, None


_op = define(
    "wpr(Tensor attn, Tensor? start=None, int max_iters=30, float tol=1e-6) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=lambda given: math.prod(given["attn"]) * given["max_iters"],
)


def wpr(attn: Tensor, start: Tensor | None = None, max_iters: int = 30, tol: float = 1e-6) -> Tensor:
    """Weighted page rank: power iteration ``s <- A^T s`` of every image and head.

    There is no damping and no renormalisation. The rows of a softmax sum to 1, so the sum of ``s`` is kept, and with
    the default start the scores have mean 1. A GPU reads a matrix once where it fits on chip (in 16-bit dtypes about
    270 tokens, and 890 where blocks form clusters: compute capability 9.0), else in every iteration.

    Args:
        attn: attention probabilities, rows are queries, ``[B, H, N, N]``; float16, bfloat16, float32 or float64.
        start: scores before the first iteration, ``[N]`` or ``[B, H, N]``; ones by default.
        max_iters: at most this many iterations; 0 returns the start.
        tol: an image's head stops after the iteration that changes it by ``sum |s_t - s_(t-1)| <= tol * N``.

    Returns:
        Scores ``[B, H, N]``, float32 (float64 when ``attn`` is). A NaN in ``attn`` gives NaN scores.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: ``attn`` is not ``[B, H, N, N]``, ``start`` does not fit it, ``max_iters`` or ``tol`` is negative.

    Source: Zero-TPrune (CVPR 2024), section 3.2, algorithm 1, on the mean-1 scale.
    """
    return _op(attn, widened(start, attn, integers=True), max_iters, tol)
