"""Keep the best patch tokens and fuse the rest (Top-K; EViT; POMT, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice

from ._check import accumulate_dtype
from ._define import define
from ._gather import check_selection, kept_rows, kept_rows_gradient
from ._select import split
from ._similarity import take_rows

FUSE = ("none", "mean", "weighted")


def _check(x: Tensor, scores: Tensor, keep: int, num_prefix: int, fuse: str) -> None:
    check_selection(x, scores, keep, num_prefix)
    check_choice("fuse", fuse, FUSE)


def _weights(scores: Tensor, dropped: Tensor, fuse: str, dtype: torch.dtype) -> Tensor:
    """Weight of every dropped token in the fused one, [B, D]."""
    if fuse == "weighted":
        return scores.gather(1, dropped).to(dtype)
    return torch.full(dropped.shape, 1.0 / dropped.shape[1], dtype=dtype, device=dropped.device)


def reference(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0, fuse: str = "none") -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    _check(x, scores, keep, num_prefix, fuse)
    kept, dropped = split(scores, keep, num_prefix)
    parts = [kept_rows(x, kept, num_prefix)]
    if fuse != "none" and dropped.shape[1] > 0:
        wide = take_rows(x, dropped).to(accumulate_dtype(x.dtype))
        weighted = wide if fuse == "mean" else wide * _weights(scores, dropped, fuse, wide.dtype).unsqueeze(-1)
        fused = weighted.mean(1, keepdim=True) if fuse == "mean" else weighted.sum(1, keepdim=True)
        parts.append(fused.to(x.dtype))
    return torch.cat(parts, 1), kept


def _fake(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0, fuse: str = "none") -> tuple[Tensor, Tensor]:
    _check(x, scores, keep, num_prefix, fuse)
    batch, tokens, channels = x.shape
    fused = int(fuse != "none" and keep < tokens - num_prefix)
    kept = scores.new_empty((batch, keep), dtype=torch.int64)
    return x.new_empty((batch, num_prefix + keep + fused, channels)), kept


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scores, _, ctx.num_prefix, ctx.fuse = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.shape, ctx.scores_dtype = x.shape, scores.dtype
    needs_values = ctx.fuse == "weighted"
    ctx.save_for_backward(kept, scores if needs_values else None, x if needs_values else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    kept, scores, x = ctx.saved_tensors
    batch, tokens, _ = ctx.shape
    prefix, keep = ctx.num_prefix, kept.shape[1]
    grad_x = kept_rows_gradient(grad[:, : prefix + keep], kept, prefix, tokens)
    grad_scores = None
    if grad.shape[1] > prefix + keep:
        alive = torch.zeros((batch, tokens), dtype=torch.bool, device=grad.device).scatter(1, kept, True)
        dropped = ~alive & (torch.arange(tokens, device=grad.device) >= prefix)
        grad_fused = grad[:, -1:]
        if ctx.fuse == "weighted":
            grad_x = grad_x + torch.where(dropped, scores, 0).unsqueeze(-1).to(grad.dtype) * grad_fused
            grad_scores = torch.where(dropped, (x * grad_fused).sum(-1), 0).to(ctx.scores_dtype)
        else:
            grad_x = grad_x + dropped.unsqueeze(-1) * grad_fused / (tokens - prefix - keep)
    return grad_x, grad_scores, None, None, None


_op = define(
    'topk_gather(Tensor x, Tensor scores, int keep, int num_prefix=0, str fuse="none") -> (Tensor, Tensor)',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def topk_gather(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0, fuse: str = "none") -> tuple[Tensor, Tensor]:
    """Keep the ``keep`` patch tokens with the highest scores, in their original order, behind the prefix tokens.

    Equal scores: the lower index wins. NaN scores sort last, below minus infinity. Each image is decided on its own.

    Args:
        x: tokens ``[B, N, C]``; float16, bfloat16, float32 or float64.
        scores: one score a token ``[B, N]``, any floating dtype; the entries of the prefix tokens are ignored.
        keep: patch tokens to keep, 1..N - ``num_prefix``.
        num_prefix: prefix tokens (class, distillation, registers) in front; always kept.
        fuse: what becomes of the other patch tokens: ``none`` drops them, ``mean`` appends their plain mean as the
            last token, ``weighted`` appends ``sum_i scores_i * x_i``. With nothing left over, nothing is appended.

    Returns:
        ``(tokens, index)``: ``tokens`` ``[B, num_prefix + keep (+ 1), C]`` and ``index`` ``[B, keep]`` int64, the
        positions in ``x`` of the kept patch tokens, ascending.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together, ``keep`` or ``num_prefix`` is out of range, ``fuse`` is unknown.

    Source: EViT (ICLR 2022), section 3.2 (``weighted``); POMT (WACV 2025), section 3 (``mean``).
    """
    return _op(x, scores, keep, num_prefix, fuse)
