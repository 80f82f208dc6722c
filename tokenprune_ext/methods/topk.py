"""Top-K: keep the tokens the class token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tokenprune_ext.patch.context import AttentionContext
from tokenprune_ext.patch.host import Host

from .base import register, scaled_layers
from .scored import ScoredMethod

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class TopK(ScoredMethod):
    """Attention of the class token, averaged over the heads; without a class token, mean attention received.

    Source: the score of EViT (ICLR 2022) with the other tokens dropped; the Top-K baseline of POMT (WACV 2025).
    """

    name: ClassVar[str] = "topk"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks 3, 6 and 9 of 12."""
        return scaled_layers((3, 6, 9), depth)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64)."""
        if ctx.has_class_token:
            return ctx.attention_given("mean")
        return ctx.attention_received("mean", "all")

    def score_macs(self, cost: BlockCost, host: Host, tokens: int) -> int:
        return (tokens if host.has_class_token else tokens**2) * cost.heads * cost.head_dim
