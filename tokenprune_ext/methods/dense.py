"""No pruning at all: the dense model, with or without its class-token-only last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

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
        """Every token, whatever ``keep`` says; nothing asks, as it has no layers."""
        return Reduced(ctx.x, torch.arange(ctx.num_prefix, ctx.x.shape[1], device=ctx.x.device).expand(len(ctx.x), -1))

    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        return 0

    def min_keep(self, entering: int) -> int:
        """All of them."""
        return entering
