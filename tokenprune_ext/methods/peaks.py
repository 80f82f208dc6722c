"""Peaks: keep tokens that are important and unlike any more important one; merge the others into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_bool, check_choice
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from .base import check_number, register, scaled_layers
from .scored import ScoredMethod, merge_into

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost

IMPORTANCE = ("auto", "class", "received", "wpr", "norm")
_WPR_ITERS = 5


@register
@dataclass(frozen=True, kw_only=True)
class Peaks(ScoredMethod):
    """Importance times diversity in one score: ``importance ** exponent * (1 - near)``.

    ``near`` is a token's largest cosine similarity to a more important patch token, -1 for the most important one. What
    is kept are the peaks of importance; each other token lies on the slope of one and is merged into it.

    Args:
        importance: ``class``: the class token's attention; ``received``: the attention of all tokens; ``wpr``: page
            rank, 5 iterations; each averaged over the heads. ``norm``: the length of the token. ``auto`` is ``class``
            for models with a class token, else ``received``. Attention counts a token as often as the patches it stands
            for, by its log(size).
        value_length: the first three are multiplied, head by head, with the length of the token's value vector: what a
            token adds to others is its attention times its value.
        exponent: weight of importance against diversity, positive.
        reduction: see ``ScoredMethod``.
        proportional: see ``ScoredMethod``.

    Source: this project. Relatives: density peaks (Rodriguez and Laio, Science 2014), with importance in the place of
    density; the two stages of Zero-TPrune (CVPR 2024); token sizes of ToMe (ICLR 2023).
    """

    name: ClassVar[str] = "peaks"

    reduction: str = "merge"
    importance: str = "auto"
    value_length: bool = True
    exponent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("importance", self.importance, IMPORTANCE)
        check_bool("value_length", self.value_length)
        check_number("exponent", self.exponent, 0, strict=True)

    def check_host(self, host: Host) -> None:
        super().check_host(host)
        if self.importance == "class" and not host.has_class_token:
            raise ValueError(f"importance='class' needs a class token, and {host.model} has none")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks 3, 4, 5, 6 and 8 of 12: where an early choice saves most, and few, since each costs time itself."""
        return scaled_layers((3, 4, 5, 6, 8), depth)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Score ``[B, N]``, float32 (float64 for float64)."""
        score, _, _, _ = self._match(ctx, ctx.num_patches)
        return score

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        if self.reduction != "merge":
            return super().reduce(ctx, keep)
        score, kept, dropped, match = self._match(ctx, keep)
        return merge_into(ctx, kept, dropped, match, self.proportional, lambda: score)

    def _match(self, ctx: AttentionContext, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.peaks_match(ctx.x, self.importance_scores(ctx), keep, ctx.num_prefix, self.exponent)

    def score_macs(self, cost: BlockCost, host: Host, tokens: int) -> int:
        """A token is compared with the more important ones only: every pair once."""
        patches = tokens - host.num_prefix_tokens
        width = cost.heads * cost.head_dim
        source = self._source(host.has_class_token)
        attention = {"class": tokens, "received": tokens**2, "wpr": tokens**2, "norm": 0}[source] * width
        iterations = {"wpr": _WPR_ITERS, "received": int(self.value_length)}.get(source, 0) * tokens**2 * cost.heads
        lengths = tokens * width if self.value_length and source != "norm" else 0
        return patches * (patches - 1) // 2 * cost.channels + attention + iterations + lengths

    def _source(self, has_class_token: bool) -> str:
        return self.importance if self.importance != "auto" else "class" if has_class_token else "received"

    def importance_scores(self, ctx: AttentionContext) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64)."""
        source = self._source(ctx.has_class_token)
        if source == "norm":
            dtype = torch.promote_types(ctx.x.dtype, torch.float32)
            return torch.linalg.vector_norm(ctx.x.detach(), dim=-1, dtype=dtype)
        if source == "received" and not self.value_length:
            return ctx.attention_received("mean", "all")
        if source == "class":
            return ctx.attention_given("mean", self.value_length)
        # One iteration from ones is the attention received, head by head.
        heads = ctx.page_rank(None, 1 if source == "received" else _WPR_ITERS)
        if self.value_length:
            heads = heads * torch.linalg.vector_norm(ctx.v, dim=-1, dtype=heads.dtype)
        return heads.mean(1)
