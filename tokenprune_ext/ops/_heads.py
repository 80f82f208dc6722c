"""Reduction over the heads, the same for every operator that has one."""

from __future__ import annotations

from torch import Tensor

HEAD_REDUCE = ("mean", "max", "sum")


def reduce_heads(values: Tensor, head_reduce: str) -> Tensor:
    """``values`` ``[B, H, ...]`` -> ``[B, ...]``."""
    if head_reduce == "max":
        return values.amax(1)
    reduced = values.sum(1)
    return reduced / values.shape[1] if head_reduce == "mean" else reduced


def reduce_heads_gradient(values: Tensor | None, grad: Tensor, head_reduce: str, heads: int) -> Tensor:
    """From ``grad`` ``[B, 1, ...]`` to the gradient of ``values``, which are needed for ``max`` only.

    Both may have dimensions of size 1 where the gradient is the same for all.
    """
    if head_reduce == "max":
        assert values is not None
        is_max = (values == values.amax(1, keepdim=True)).to(grad.dtype)
        return grad * is_max / is_max.sum(1, keepdim=True)  # equal maxima share the gradient, as in torch.amax
    return grad / heads if head_reduce == "mean" else grad
