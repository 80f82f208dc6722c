"""Attention received by every token, reduced over the heads (POMT, section 3; Top-K; EViT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice, check_int

from ._check import accumulate_dtype, check_attention
from ._define import define
from ._heads import HEAD_REDUCE, reduce_heads, reduce_heads_gradient

QUERY_ROWS = ("all", "patch", "cls")


def _check(attn: Tensor, head_reduce: str, query_rows: str, num_prefix: int) -> None:
    check_attention(attn)
    check_choice("head_reduce", head_reduce, HEAD_REDUCE)
    check_choice("query_rows", query_rows, QUERY_ROWS)
    check_int("num_prefix", num_prefix, 0, attn.shape[-1], "the number of tokens")
    if query_rows == "cls" and num_prefix < 1:
        raise ValueError("query_rows='cls' needs a class token: num_prefix must be at least 1, got 0")


def _rows(attn: Tensor, query_rows: str, num_prefix: int) -> Tensor:
    """The query rows that count: [B, H, R, N]."""
    if query_rows == "all":
        return attn
    return attn[:, :, num_prefix:] if query_rows == "patch" else attn[:, :, :1]


def reference(attn: Tensor, head_reduce: str = "mean", query_rows: str = "all", num_prefix: int = 0) -> Tensor:
    """The operator in plain torch."""
    _check(attn, head_reduce, query_rows, num_prefix)
    rows = _rows(attn, query_rows, num_prefix).to(accumulate_dtype(attn.dtype))
    received = reduce_heads(rows, head_reduce).sum(1)
    received[:, :num_prefix] = 0
    return received


def _fake(attn: Tensor, head_reduce: str = "mean", query_rows: str = "all", num_prefix: int = 0) -> Tensor:
    _check(attn, head_reduce, query_rows, num_prefix)
    return attn.new_empty((attn.shape[0], attn.shape[-1]), dtype=accumulate_dtype(attn.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attn, ctx.head_reduce, ctx.query_rows, ctx.num_prefix = inputs
    # Only the maximum has a gradient that depends on the input.
    ctx.heads, ctx.dtype = attn.shape[1], attn.dtype
    ctx.save_for_backward(attn if ctx.head_reduce == "max" else None)


def attn_colsum_gradient(
    attn: Tensor | None, grad: Tensor, head_reduce: str, query_rows: str, num_prefix: int, heads: int
) -> Tensor:
    """Gradient of the attention matrix ``[B, H, N, N]``; ``attn`` is needed for ``max`` only."""
    batch, tokens = grad.shape
    share = torch.where(torch.arange(tokens, device=grad.device) < num_prefix, 0.0, grad)[:, None, None, :]
    count = {"all": tokens, "patch": tokens - num_prefix, "cls": 1}[query_rows]
    rows = None if attn is None else _rows(attn, query_rows, num_prefix)
    grad_rows = reduce_heads_gradient(rows, share, head_reduce, heads).expand(batch, heads, count, tokens)
    above = num_prefix if query_rows == "patch" else 0
    below = tokens - above - count
    return torch.nn.functional.pad(grad_rows, (0, 0, above, below))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (attn,) = ctx.saved_tensors
    grad_attn = attn_colsum_gradient(attn, grad, ctx.head_reduce, ctx.query_rows, ctx.num_prefix, ctx.heads)
    return grad_attn.to(ctx.dtype), None, None, None


_op = define(
    'attn_colsum(Tensor attn, str head_reduce="mean", str query_rows="all", int num_prefix=0) -> Tensor',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def attn_colsum(attn: Tensor, head_reduce: str = "mean", query_rows: str = "all", num_prefix: int = 0) -> Tensor:
    """Attention received: the sum over query rows of the reduction over heads.

    The reduction over the heads comes first, for each query and key; ``max`` is therefore no function of the column
    sums of the single heads.

    Args:
        attn: attention probabilities, rows are queries, ``[B, H, N, N]``; float16, bfloat16, float32 or float64.
        head_reduce: ``mean``, ``max`` or ``sum`` over the heads.
        query_rows: which queries count: ``all``, ``patch`` (all but the prefix tokens) or ``cls`` (row 0 alone).
        num_prefix: prefix tokens (class, distillation, registers) in front; their entries of the result are 0.

    Returns:
        Attention received by every token, ``[B, N]``, float32 (float64 when ``attn`` is). NaN propagates.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: ``attn`` is not ``[B, H, N, N]``, a choice is unknown, ``num_prefix`` is not in 0..N, or
            ``query_rows`` is ``cls`` without a prefix token.

    Source: POMT (WACV 2025), section 3 (``max`` over heads, ``patch`` rows); EViT (ICLR 2022), section 3 (``cls``).
    """
    return _op(attn, head_reduce, query_rows, num_prefix)
