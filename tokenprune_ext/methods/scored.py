"""Methods that give every token a score, and what can become of the tokens that are not kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_bool, check_choice
from tokenprune_ext.ops._select import split
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from .base import Method

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost

REDUCTIONS = ("drop", "mean", "weighted", "sum", "merge")


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(Method):
    """A method that keeps the patch tokens with the highest scores. Any score goes with any reduction.

    Args:
        reduction: what becomes of the others. ``drop``: they are gone. One more token behind the kept ones, which
            counts as one of them: ``mean``: their plain mean (POMT); ``weighted``: their mean weighted by their
            scores; ``sum``: the sum of score times token, for scores that sum to 1 (EViT). ``merge``: each is merged
            into its most similar kept token, by cosine, as the mean weighted by how many patches each stands for.
        proportional: after merging, a token counts in attention as often as the patches it stands for: log(size) is
            added to the logits (ToMe, section 3).
    """

    reduction: str = "drop"
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_bool("proportional", self.proportional)

    @abstractmethod
    def scores(self, ctx: AttentionContext) -> Tensor:
        """One score a token, ``[B, N]``, floating; the highest stay. Entries of prefix tokens are ignored."""

    def score_macs(self, cost: BlockCost, host: Host, tokens: int) -> int:
        """MACs of :meth:`scores`, at a block of this cost that ``tokens`` tokens (prefix included) enter."""
        return 0

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        return reduce_tokens(ctx, self.scores(ctx), keep, self.reduction, self.proportional)

    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        merging = merging_macs(cost, tokens - host.num_prefix_tokens, keep) if self.reduction == "merge" else 0
        return self.score_macs(cost, host, tokens) + merging

    @property
    def carries_size(self) -> bool:
        return self.reduction == "merge"

    def min_keep(self, entering: int) -> int:
        return 2 if self.reduction in ("mean", "weighted", "sum") else 1


def reduce_tokens(ctx: AttentionContext, scores: Tensor, keep: int, reduction: str, proportional: bool) -> Reduced:
    """Keep the tokens with the highest scores ``[B, N]``, and do with the others what ``reduction`` says."""

    def ranked() -> Tensor:
        return scores

    if reduction == "merge":
        kept, dropped = split(scores, keep, ctx.num_prefix)
        match = nearest_kept(ctx, kept).gather(1, dropped)
        match = torch.where(match < 0, dropped, match)  # a token with NaN has no partner and goes nowhere
        return merge_into(ctx, kept, dropped, match, proportional, ranked)
    if reduction == "drop":
        return Reduced(*ops.topk_gather(ctx.x, scores, keep, ctx.num_prefix), scores=ranked)
    if reduction == "weighted":
        x, kept = ops.topk_gather(ctx.x, scores, keep - 1, ctx.num_prefix)
        fused = _weights_of_others(scores, kept, ctx.num_prefix).to(x.dtype).unsqueeze(1) @ ctx.x[:, ctx.num_prefix :]
        return Reduced(torch.cat([x, fused], 1), kept, fused=True, scores=ranked)
    fuse = "mean" if reduction == "mean" else "weighted"
    return Reduced(*ops.topk_gather(ctx.x, scores, keep - 1, ctx.num_prefix, fuse), fused=True, scores=ranked)


def _weights_of_others(scores: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """Scores of the patch tokens that are not kept, over their sum, and 0 for those that are; ``[B, N - num_prefix]``.

    Summed among themselves: beside one large kept score, the difference of two sums would be nothing but rounding.
    """
    tiny = torch.finfo(scores.dtype).tiny  # all of them 0: the plain mean
    others = (scores + tiny).scatter(1, kept, 0.0)[:, num_prefix:]
    return others / others.sum(1, keepdim=True)


def nearest_kept(ctx: AttentionContext, kept: Tensor) -> Tensor:
    """For every patch token that is not kept, the position of the most similar one that is; ``[B, N]``, else -1."""
    rank = torch.ones(ctx.x.shape[:2], dtype=torch.int64, device=kept.device).scatter(1, kept, 0)
    _, index = ops.nearest_token(ctx.x.detach(), rank, ctx.num_prefix)
    return index


def merging_macs(cost: BlockCost, patches: int, keep: int) -> int:
    """MACs of finding the most similar kept token of every other one, for ``patches`` tokens of which ``keep`` stay."""
    return (patches - keep) * keep * cost.channels


def merge_into(
    ctx: AttentionContext,
    kept: Tensor,
    dropped: Tensor,
    match: Tensor,
    proportional: bool,
    scores: Callable[[], Tensor] | None = None,
) -> Reduced:
    """Merge the tokens at ``dropped`` ``[B, R]`` into those at ``match`` ``[B, R]``; their own position is nowhere."""
    x, size, log_size = ops.merge_tokens(ctx.x, ctx.size, kept, dropped, match, ctx.num_prefix)

    def into() -> Tensor:
        return positions(ctx).scatter(1, dropped, match)

    return Reduced(x, kept, size=size, into=into, bias=proportional, scores=scores, log_size=log_size)


def positions(ctx: AttentionContext) -> Tensor:
    """0, 1, 2, ...: every token's own position, int64 ``[B, N]``."""
    batch, tokens = ctx.x.shape[:2]
    return torch.arange(tokens, device=ctx.x.device).expand(batch, -1)
