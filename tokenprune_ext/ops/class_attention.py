"""What the class token attends to, and how much each token would add to it (Top-K; EViT; ATS; Peaks)."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice

from ._check import accumulate_dtype, check_floating
from ._define import define
from ._heads import HEAD_REDUCE, reduce_heads
from ._qk import check_qk, logits


def _check(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float, head_reduce: str) -> None:
    check_qk(q, k, scale)
    check_choice("head_reduce", head_reduce, HEAD_REDUCE)
    batch, heads, tokens, _ = k.shape
    for name, value, shape in (("v", v, "[B, H, N, d]"), ("bias", bias, "[B, H, 1, N]")):
        if value is None:
            continue
        check_floating(name, value, shape)
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {value.device}")
    if v is not None and (v.shape[:3] != k.shape[:3] or v.shape[3] < 1):
        raise ValueError(f"v must have shape [B, H, N, d] to go with k {list(k.shape)}, got {list(v.shape)}")
    if bias is not None:
        fits = bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads) and bias.shape[2:] == (1, tokens)
        if not fits:
            raise ValueError(f"bias must have shape [1 or B, 1 or H, 1, N] to go with k {list(k.shape)}, "
                             f"got {list(bias.shape)}")  # fmt: skip


def reference(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float, head_reduce: str = "mean"
) -> Tensor:
    """The operator in plain torch."""
    _check(q, k, v, bias, scale, head_reduce)
    row = logits(q[:, :, :1], k, scale)
    if bias is not None:
        row = row + bias.to(row.dtype)
    weight = row.softmax(-1).squeeze(2)
    if v is not None:
        weight = weight * torch.linalg.vector_norm(v, dim=-1, dtype=weight.dtype)
    return reduce_heads(weight, head_reduce)


def _fake(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float, head_reduce: str = "mean"
) -> Tensor:
    _check(q, k, v, bias, scale, head_reduce)
    return q.new_empty((k.shape[0], k.shape[2]), dtype=accumulate_dtype(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("class_attention chooses tokens and has no gradient")


_op = define(
    'class_attention(Tensor q, Tensor k, Tensor? v, Tensor? bias, float scale, str head_reduce="mean") -> Tensor',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=lambda given: math.prod(given["k"]) * (1 if given["v"] is None else 2),
)


def class_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    head_reduce: str = "mean",
) -> Tensor:
    """The attention of token 0 to every token, reduced over the heads; O(B H N) memory.

    With values it is multiplied, head by head, with the length of each token's value vector: what a token adds to
    others is its attention times its value. Carries no gradient.

    Args:
        q: queries, only the first of which is looked at, ``[B, H, N, d]``; float16, bfloat16, float32 or float64.
            Views of a packed qkv tensor are not copied.
        k: keys ``[B, H, N, d]``.
        scale: factor of the logits.
        v: values ``[B, H, N, any d]``; None for attention alone.
        bias: added to the logits of the first query, ``[1 or B, 1 or H, 1, N]``; None for nothing.
        head_reduce: ``mean``, ``max`` or ``sum`` over the heads.

    Returns:
        One number a token, ``[B, N]``, float32 (float64 when ``q`` is). NaN propagates.

    Raises:
        TypeError: an argument is no tensor, or dtypes are unsupported or differ.
        ValueError: shapes or devices do not go together, ``scale`` is not finite, or ``head_reduce`` is unknown.

    Source: EViT (ICLR 2022), section 3 (attention); ATS (ECCV 2022), section 3 (times the length of the value).
    """
    return _op(q, k, v, bias, scale, head_reduce)
