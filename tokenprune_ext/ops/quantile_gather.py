"""Inverse transform sampling of the patch tokens at fixed quantiles (ATS)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._check import accumulate_dtype
from ._define import define
from ._gather import check_selection, kept_rows, kept_rows_gradient
from ._select import split

RUN = 16  # as in csrc/ops/quantile_gather_params.h


def _sums(weights: Tensor) -> Tensor:
    """Cumulative sums along the rows ``[B, n]``, in runs of 16 and then over the runs, as the kernels form them.

    However many threads share a row, that gives the same bits; and a weight of 0 never raises the sum.
    """
    batch, count = weights.shape
    runs = -(-count // RUN)
    within = torch.nn.functional.pad(weights, (0, runs * RUN - count)).view(batch, runs, RUN).cumsum(2)
    before = torch.nn.functional.pad(within[:, :-1, -1].cumsum(1), (1, 0))
    return (before.unsqueeze(2) + within).flatten(1)[:, :count].contiguous()


def reference(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator in plain torch."""
    check_selection(x, scores, keep, num_prefix)
    patches = scores[:, num_prefix:].double()
    sums = _sums(torch.where(patches > 0, patches, 0.0))
    quantile = torch.arange(keep, device=x.device) + 0.5
    hit = torch.searchsorted(keep * sums, quantile * sums[:, -1:]) + num_prefix
    sampled = torch.zeros(x.shape[:2], dtype=accumulate_dtype(x.dtype), device=x.device).scatter(1, hit, 1.0)
    kept, _ = split(sampled, keep, num_prefix)
    sizes = torch.nn.functional.pad(sampled.gather(1, kept), (num_prefix, 0), value=1.0)
    log_sizes = torch.zeros_like(sizes, dtype=x.dtype).masked_fill(sizes == 0, -math.inf)
    return kept_rows(x, kept, num_prefix), kept, sizes, log_sizes[:, None, None]


def _fake(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_selection(x, scores, keep, num_prefix)
    batch, _, channels = x.shape
    rows = num_prefix + keep
    return (
        x.new_empty((batch, rows, channels)),
        x.new_empty((batch, keep), dtype=torch.int64),
        x.new_empty((batch, rows), dtype=accumulate_dtype(x.dtype)),
        x.new_empty((batch, 1, 1, rows)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, _, ctx.num_prefix = inputs
    _, kept, sizes, log_sizes = output
    ctx.mark_non_differentiable(kept, sizes, log_sizes)
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(kept)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
    (kept,) = ctx.saved_tensors
    return kept_rows_gradient(grad, kept, ctx.num_prefix, ctx.tokens), None, None, None


_op = define(
    "quantile_gather(Tensor x, Tensor scores, int keep, int num_prefix=0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def quantile_gather(x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample the patch tokens at ``keep`` quantiles of their scores, and fill up with padding what repeats leave free.

    The quantiles are (k - 1/2) / keep for k = 1..keep. Each falls on the first patch token up to which the scores sum
    to that share of the whole; a token on which at least one falls is sampled. Where several fall on one, the places
    left go to the tokens of lowest position that are not sampled, as padding.

    A score that is not above 0, NaN among them, counts as 0, and no quantile falls on its token; but where all do, the
    first token is sampled alone. Behind the first sum that is infinite, no token is sampled. Sums are formed in
    float64, in one order everywhere. Each image is decided on its own.

    Args:
        x: tokens ``[B, N, C]``; float16, bfloat16, float32 or float64.
        scores: one score a token ``[B, N]``, any floating dtype; the entries of the prefix tokens are ignored.
        keep: quantiles, and patch tokens that leave, 1..N - ``num_prefix``.
        num_prefix: prefix tokens (class, distillation, registers) in front; always kept.

    Returns:
        ``(tokens, index, sizes, log_sizes)``: ``tokens`` ``[B, num_prefix + keep, C]``, a copy of the rows, padding
        among them; ``index`` ``[B, keep]`` int64, the positions in ``x`` of its patch tokens, ascending; ``sizes``
        ``[B, num_prefix + keep]``, float32 (float64 for float64), 1 for prefix and sampled tokens and 0 for padding;
        ``log_sizes`` ``[B, 1, 1, num_prefix + keep]``, their logarithm in the dtype of ``x``: 0 or minus infinity.
        Only ``tokens`` has a gradient, to ``x``.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together, ``keep`` or ``num_prefix`` is out of range.

    Source: ATS (ECCV 2022), section 3.
    """
    return _op(x, scores, keep, num_prefix)
