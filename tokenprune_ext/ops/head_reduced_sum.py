"""One number a token from the vectors of its heads: the sum over channels of the reduction over heads (POMT)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune_ext.checks import check_choice

from ._check import accumulate_dtype, check_floating
from ._define import define
from ._heads import HEAD_REDUCE, reduce_heads, reduce_heads_gradient


def _check(features: Tensor, head_reduce: str) -> None:
    check_floating("features", features, "[B, H, N, d]")
    if min(features.shape[1:]) < 1:
        raise ValueError(
            f"features must have at least one head, one token and one channel, got shape {list(features.shape)}"
        )
    check_choice("head_reduce", head_reduce, HEAD_REDUCE)


def reference(features: Tensor, head_reduce: str = "mean") -> Tensor:
    """The operator in plain torch."""
    _check(features, head_reduce)
    return reduce_heads(features.to(accumulate_dtype(features.dtype)), head_reduce).sum(-1)


def _fake(features: Tensor, head_reduce: str = "mean") -> Tensor:
    _check(features, head_reduce)
    return features.new_empty((features.shape[0], features.shape[2]), dtype=accumulate_dtype(features.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.head_reduce = inputs
    # Only the maximum has a gradient that depends on the input.
    ctx.shape, ctx.dtype = features.shape, features.dtype
    ctx.save_for_backward(features if ctx.head_reduce == "max" else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (features,) = ctx.saved_tensors
    grad_features = reduce_heads_gradient(features, grad[:, None, :, None], ctx.head_reduce, ctx.shape[1])
    return grad_features.expand(ctx.shape).to(ctx.dtype), None


_op = define(
    'head_reduced_sum(Tensor features, str head_reduce="mean") -> Tensor',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def head_reduced_sum(features: Tensor, head_reduce: str = "mean") -> Tensor:
    """The sum over channels of the reduction over heads, for every token.

    The reduction over the heads comes first, for each channel; ``max`` is therefore no function of the sums of the
    single heads.

    Args:
        features: vectors of every head and token, e.g. values, ``[B, H, N, d]``; float16, bfloat16, float32 or float64.
            Views of a packed qkv tensor are not copied.
        head_reduce: ``mean``, ``max`` or ``sum`` over the heads.

    Returns:
        One number a token, ``[B, N]``, float32 (float64 when ``features`` is). NaN propagates.

    Raises:
        TypeError: ``features`` is no tensor, or has an unsupported dtype.
        ValueError: ``features`` is not ``[B, H, N, d]``, or ``head_reduce`` is unknown.

    Source: POMT (WACV 2025), section 3: the term of the value vectors, before its softmax over the tokens.
    """
    return _op(features, head_reduce)
