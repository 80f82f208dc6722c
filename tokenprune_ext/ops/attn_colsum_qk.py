"""Attention received by every token, from queries and keys: the attention matrix is never stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice, check_int

from ._check import accumulate_dtype, allow_tf32, widened
from ._define import define
from ._heads import HEAD_REDUCE
from ._qk import check_qk, probabilities, qk_gradients
from .attn_colsum import QUERY_ROWS, attn_colsum_gradient
from .attn_colsum import reference as attn_colsum_reference


def _check(
    q: Tensor, k: Tensor, scale: float, head_reduce: str, query_rows: str, num_prefix: int, lse: Tensor | None
) -> None:
    check_qk(q, k, scale)
    check_choice("head_reduce", head_reduce, HEAD_REDUCE)
    check_choice("query_rows", query_rows, QUERY_ROWS)
    check_int("num_prefix", num_prefix, 0, q.shape[2], "the number of tokens")
    if query_rows == "cls" and num_prefix < 1:
        raise ValueError("query_rows='cls' needs a class token: num_prefix must be at least 1, got 0")
    if lse is None:
        return
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a torch.Tensor [B, H, N] or None, got {type(lse).__name__}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {list(q.shape[:3])} to go with q {list(q.shape)}, got {list(lse.shape)}")
    if lse.dtype != accumulate_dtype(q.dtype):
        raise TypeError(f"lse must be {accumulate_dtype(q.dtype)} for q of {q.dtype}, got {lse.dtype}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on the device of q, {q.device}, got {lse.device}")


def reference(
    q: Tensor,
    k: Tensor,
    scale: float,
    head_reduce: str = "mean",
    query_rows: str = "all",
    num_prefix: int = 0,
    lse: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """The operator in plain torch; forms the matrix."""
    _check(q, k, scale, head_reduce, query_rows, num_prefix, lse)
    return attn_colsum_reference(probabilities(q, k, scale, lse), head_reduce, query_rows, num_prefix)


def _fake(
    q: Tensor,
    k: Tensor,
    scale: float,
    head_reduce: str = "mean",
    query_rows: str = "all",
    num_prefix: int = 0,
    lse: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    _check(q, k, scale, head_reduce, query_rows, num_prefix, lse)
    return q.new_empty((q.shape[0], q.shape[2]), dtype=accumulate_dtype(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, ctx.head_reduce, ctx.query_rows, ctx.num_prefix, lse, _ = inputs
    ctx.save_for_backward(q, k, lse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Forms the matrix. With ``lse`` given, it counts as a constant of its own."""
    q, k, lse = ctx.saved_tensors
    attn = probabilities(q, k, ctx.scale, lse)
    grad_attn = attn_colsum_gradient(attn, grad, ctx.head_reduce, ctx.query_rows, ctx.num_prefix, q.shape[1])
    if lse is None:
        return (*qk_gradients(attn, grad_attn, q, k, ctx.scale), *(None,) * 6)
    grad_logits = grad_attn * attn
    grad_q = torch.matmul(grad_logits * ctx.scale, k.to(attn.dtype)).to(q.dtype)
    grad_k = torch.matmul(grad_logits.transpose(-2, -1) * ctx.scale, q.to(attn.dtype)).to(k.dtype)
    return grad_q, grad_k, None, None, None, None, -grad_logits.sum(-1), None


_op = define(
    'attn_colsum_qk(Tensor q, Tensor k, float scale, str head_reduce="mean", str query_rows="all", int num_prefix=0, '
    "Tensor? lse=None, bool allow_tf32=False) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=lambda given: math.prod(given["q"]) * given["q"][2],
)


def attn_colsum_qk(
    q: Tensor,
    k: Tensor,
    scale: float,
    head_reduce: str = "mean",
    query_rows: str = "all",
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention received, the sum over query rows of the reduction over heads, without the attention matrix.

    The same numbers as :func:`attn_colsum` of ``softmax(q k^T * scale)``. Products are formed tile by tile and all
    heads of a tile are reduced before it is left, so memory beyond the inputs grows with N, not with its square. (The
    gradient forms the matrix.)

    Args:
        q: queries ``[B, H, N, d]``; float16, bfloat16, float32 or float64. Views of a packed qkv tensor are not copied.
        k: keys, like ``q``.
        scale: factor of the logits.
        head_reduce: ``mean``, ``max`` or ``sum`` over the heads.
        query_rows: which queries count: ``all``, ``patch`` (all but the prefix tokens) or ``cls`` (row 0 alone).
        num_prefix: prefix tokens (class, distillation, registers) in front; their entries of the result are 0.
        lse: logarithm of the sum over keys of ``exp(q k^T * scale)`` for every query, ``[B, H, N]``, as fused attention
            returns it; saves one of two passes over the products.

    Returns:
        Attention received by every token, ``[B, N]``, float32 (float64 when ``q`` is). NaN propagates. On a GPU,
        products of float32 tensors use tf32 when torch's own do (``torch.backends.cuda.matmul.fp32_precision``).

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not fit, a choice is unknown, ``num_prefix`` is not in 0..N, ``query_rows`` is ``cls``
            without a prefix token, or ``scale`` is not finite.

    Source: POMT (WACV 2025), section 3 (``max`` over heads, ``patch`` rows); EViT (ICLR 2022), section 3 (``cls``).
    """
    return _op(q, k, scale, head_reduce, query_rows, num_prefix, widened(lse, q), allow_tf32(q))
