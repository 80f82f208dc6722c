"""No pruning at all: the dense model, with or without its class-token-only last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from .base import Method, register

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Keeps every token, so that the dense model can have what pruned ones have: ``class_token_only``."""

    name: ClassVar[str] = "dense"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """None."""
        return ()

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        raise NotImplementedError("dense prunes nothing")

    def scoring_macs(self, cost: BlockCost, host: Host, tokens: int, keep: int) -> int:
        return 0

    def min_keep(self, entering: int) -> int:
        """All of them."""
        return entering
