"""Weighted page rank of the attention graph, from queries and keys: the attention matrix is never stored."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._check import accumulate_dtype, allow_tf32, widened
from ._define import define
from ._qk import check_qk, probabilities, qk_gradients
from .wpr import check_iteration, wpr_gradient
from .wpr import reference as wpr_reference


def _check(q: Tensor, k: Tensor, scale: float, start: Tensor | None, max_iters: int, tol: float) -> None:
    check_qk(q, k, scale)
    check_iteration("q", q, start, max_iters, tol)


def reference(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    allow_tf32: bool = False,
) -> Tensor:
    """The operator in plain torch; forms the matrix."""
    _check(q, k, scale, start, max_iters, tol)
    return wpr_reference(probabilities(q, k, scale), start, max_iters, tol)


def _fake(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    allow_tf32: bool = False,
) -> Tensor:
    _check(q, k, scale, start, max_iters, tol)
    return q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, start, ctx.max_iters, ctx.tol, _ = inputs
    ctx.save_for_backward(q, k, start)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Forms the matrix."""
    q, k, start = ctx.saved_tensors
    attn = probabilities(q, k, ctx.scale)
    grad_attn, grad_start = wpr_gradient(attn, start, grad, ctx.max_iters, ctx.tol)
    return (*qk_gradients(attn, grad_attn, q, k, ctx.scale), None, grad_start, None, None, None)


_op = define(
    "wpr_qk(Tensor q, Tensor k, float scale, Tensor? start=None, int max_iters=30, float tol=1e-6, "
    "bool allow_tf32=False) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=lambda given: math.prod(given["q"][:3]) * given["q"][2] * (given["q"][3] + given["max_iters"]),
)


def wpr_qk(
    q: Tensor, k: Tensor, scale: float, start: Tensor | None = None, max_iters: int = 30, tol: float = 1e-6
) -> Tensor:
    """Weighted page rank of ``softmax(q k^T * scale)`` for every image and head, without the attention matrix.

    The same scores as :func:`wpr`. A matrix that fits on chip (about 260 tokens in 16-bit dtypes on a GPU) is
    formed there once; for more tokens it is formed again, tile by tile, in every iteration, so memory beyond the inputs
    grows with N, not with its square. A CPU holds one matrix a thread up to 2 MiB, one in all up to 32 MiB (2896
    tokens), and forms larger ones again. (The gradient forms the matrix.)

    Args:
        q: queries ``[B, H, N, d]``; float16, bfloat16, float32 or float64. Views of a packed qkv tensor are not copied.
        k: keys, like ``q``.
        scale: factor of the logits; divide it by a temperature to rank on sharper or flatter attention.
        start: scores before the first iteration, ``[N]`` or ``[B, H, N]``; ones by default.
        max_iters: at most this many iterations; 0 returns the start.
        tol: an image's head stops after the iteration that changes it by ``sum |s_t - s_(t-1)| <= tol * N``.

    Returns:
        Scores ``[B, H, N]``, float32 (float64 when ``q`` is). A NaN gives NaN scores. On a GPU the probabilities of
        16-bit inputs are held in float16 while they are on chip; products of float32 tensors use tf32 when
        ``torch.backends.cuda.matmul.allow_tf32`` is set.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not fit, ``max_iters`` or ``tol`` is negative, or ``scale`` is not finite.

    Source: Zero-TPrune (CVPR 2024), section 3.2, algorithm 1, on the mean-1 scale.
    """
    return _op(q, k, scale, widened(start, q, integers=True), max_iters, tol, allow_tf32(q))
