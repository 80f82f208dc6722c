"""Top-K: keep the tokens the class token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.patch.context import AttentionContext

from .base import Method, register, scaled_layers


@register
@dataclass(frozen=True)
class TopK(Method):
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
            return ctx.class_attention().mean(dim=1)
        return ops.attn_colsum_qk(ctx.q, ctx.k, ctx.scale, "mean", "all", ctx.num_prefix)
