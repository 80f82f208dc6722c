"""POMT, "pruning one more token": one pruning layer, the least important tokens replaced by their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_choice
from tokenprune_ext.patch.context import AttentionContext

from .base import Method, register


@register
@dataclass(frozen=True)
class Pomt(Method):
    """Attention received from the other patches plus the weight of the token's own value vector.

    To remove R tokens, the R + 1 with the lowest scores are replaced by their plain mean, appended last.

    Args:
        feature: which vectors of the token weigh in: ``v``, ``k`` or ``q``.
        head_reduce: reduction over the heads of both terms: ``max``, ``mean`` or ``sum``.

    Source: "Pruning One More Token is Enough", WACV 2025 (arXiv 2407.05941), section 3.
    """

    name: ClassVar[str] = "pomt"
    fuse: ClassVar[Literal["none", "mean"]] = "mean"

    feature: str = "v"
    head_reduce: str = "max"

    def __post_init__(self) -> None:
        check_choice("feature", self.feature, ("v", "k", "q"))
        check_choice("head_reduce", self.head_reduce, ("max", "mean", "sum"))

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The block at a quarter of the depth: 3 of 12, 10 of 40."""
        return (depth // 4,)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64)."""
        received = ops.attn_colsum_qk(ctx.q, ctx.k, ctx.scale, self.head_reduce, "patch", ctx.num_prefix)
        received = received / received.amax(dim=1, keepdim=True)
        return received + self._feature_weight(ctx).to(received.dtype)

    def _feature_weight(self, ctx: AttentionContext) -> Tensor:
        """Softmax over all tokens of the channel sum of the head-reduced feature, ``[B, N]``."""
        return ops.head_reduced_sum(getattr(ctx, self.feature), self.head_reduce).softmax(dim=-1)
