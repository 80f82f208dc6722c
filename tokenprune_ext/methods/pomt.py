"""POMT, "pruning one more token": one pruning layer, the least important tokens replaced by their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_choice
from tokenprune_ext.patch.context import AttentionContext
from tokenprune_ext.patch.host import Host

from .base import register
from .scored import ScoredMethod

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class Pomt(ScoredMethod):
    """Attention received from the other patches plus the weight of the token's own value vector.

    To remove R tokens, the R + 1 with the lowest scores are replaced by their plain mean, appended last.

    Args:
        feature: which vectors of the token weigh in: ``v``, ``k`` or ``q``.
        head_reduce: reduction over the heads of both terms: ``max``, ``mean`` or ``sum``.
        reduction: see ``ScoredMethod``.
        proportional: see ``ScoredMethod``.

    Source: "Pruning One More Token is Enough", WACV 2025 (arXiv 2407.05941), section 3.
    """

    name: ClassVar[str] = "pomt"

    reduction: str = "mean"
    feature: str = "v"
    head_reduce: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("feature", self.feature, ("v", "k", "q"))
        check_choice("head_reduce", self.head_reduce, ("max", "mean", "sum"))

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The block at a quarter of the depth: 3 of 12, 10 of 40."""
        return (depth // 4,)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64)."""
        received = ctx.attention_received(self.head_reduce, "patch")
        received = received / received.amax(dim=1, keepdim=True)
        return received + self._feature_weight(ctx).to(received.dtype)

    def score_macs(self, cost: BlockCost, host: Host, tokens: int) -> int:
        return tokens**2 * cost.heads * cost.head_dim

    def _feature_weight(self, ctx: AttentionContext) -> Tensor:
        """Softmax over all tokens of the channel sum of the head-reduced feature, ``[B, N]``."""
        return ops.head_reduced_sum(getattr(ctx, self.feature), self.head_reduce).softmax(dim=-1)
