"""Zero-TPrune: importance by weighted page rank on the attention graph, similarity among the less important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_bool, check_choice, check_int
from tokenprune_ext.ops._select import split
from tokenprune_ext.ops.zero_tprune import spread
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from . import zero_tprune_stages as stages
from .base import check_number, register, scaled_layers
from .scored import ScoredMethod, merge_into, merging_macs, nearest_kept, positions

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(ScoredMethod):
    """One pruning layer is I' -> S -> I: a rough ranking, then similarity, then importance.

    I' ranks the tokens by one iteration of page rank. S pairs the less important half with the more important one and
    removes the ``similar`` members that are most like their partners. I ranks the survivors by page rank on the
    attention among themselves and keeps the best. Page rank runs per head; heads whose scores vary too little or too
    much over the patches are left out, and the others are combined by their root mean square.

    Args:
        start: scores the iteration begins with: ``uniform``, or ``class``, where the class token weighs sqrt(N) times
            as much; ``auto`` is ``class`` for models that have a class token.
        iters: iterations of I in the first quarter of the blocks, in the middle, and in the last quarter.
        tol: an image's head stops after the iteration that changes it by less than ``tol`` a token on average.
        tau: temperature of the attention that is ranked.
        vmin: smallest variance of a head's scores over the patch tokens that passes the head filter.
        vmax: largest such variance.
        similar: tokens S removes; 0 leaves S and I' out; None for 10. At most what the layer removes, and at most half.
        partition: who may go in S: the less important half (``unimportant``, sequential-U), the more important half
            (``important``, sequential-I), every other token (``alternate``), or a ``random`` half.
        feature: what S compares: ``key`` averaged over the heads, ``key_heads`` concatenated, ``query`` or ``value``
            averaged, or the token itself, ``hidden``.
        metric: how S compares: by ``cosine``, as published, the product ``dot``, or the ``euclidean`` distance.
        mid_block: prune between attention and MLP instead of behind the block.
        reduction: ``drop`` as published; ``merge``: what S removes goes into its partner, what I removes into its most
            similar survivor, as the mean weighted by how many patches each stands for.
        proportional: see ``ScoredMethod``.

    Source: Wang, Dedhia, Jha, "Zero-TPrune", CVPR 2024, sections 3.2 and 3.3. Scores are on the mean-1 scale, on which
    the published variance bounds apply.
    """

    name: ClassVar[str] = "zero_tprune"

    start: str = "auto"
    iters: tuple[int, int, int] = (30, 5, 1)
    tol: float = 1e-6
    tau: float = 1.0
    vmin: float = 0.01
    vmax: float = 0.7
    similar: int | None = None
    partition: str = "unimportant"
    feature: str = "key"
    metric: str = "cosine"
    mid_block: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "iters", stages.checked_iters(self.iters))
        check_number("tol", self.tol, 0)
        check_number("tau", self.tau, 0, strict=True)
        check_number("vmin", self.vmin, 0)
        check_number("vmax", self.vmax, self.vmin)
        if self.similar is not None:
            check_int("similar", self.similar, 0)
        check_choice("start", self.start, ("auto", "class", "uniform"))
        check_choice("partition", self.partition, stages.PARTITIONS)
        check_choice("feature", self.feature, stages.FEATURES)
        check_choice("metric", self.metric, stages.METRICS)
        check_choice("reduction", self.reduction, ("drop", "merge"))
        check_bool("mid_block", self.mid_block)

    @property
    def where(self) -> Literal["attention", "block"]:
        return "attention" if self.mid_block else "block"

    def check_host(self, host: Host) -> None:
        super().check_host(host)
        if self.start == "class" and not host.has_class_token:
            raise ValueError(f"start='class' needs a class token, and {host.model} has none")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """After blocks 2, 5 and 8 of 12; mid-block 3, 6 and 9."""
        layers = scaled_layers((3, 6, 9), depth)
        return layers if self.mid_block else tuple(sorted({max(layer - 1, 0) for layer in layers}))

    def iterations(self, layer: int, depth: int) -> int:
        """Power iterations at a block: many while attention is flat, one where it is sharp."""
        edge = depth // 4
        first, middle, last = self.iters
        return first if layer < edge else last if layer >= depth - edge else middle

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        removed = self._removed_by_similarity(ctx.num_patches, keep)
        if not removed:
            return super().reduce(ctx, keep)
        scores, similar, match = self._run_stages(ctx, removed)

        def ranked() -> Tensor:
            return scores.masked_fill(scores == -torch.inf, torch.nan)

        if self.reduction == "drop":
            return Reduced(*ops.topk_gather(ctx.x, scores, keep, ctx.num_prefix), scores=ranked)
        kept, dropped = split(scores, keep, ctx.num_prefix)
        partner = positions(ctx).scatter(1, similar, match).gather(1, dropped)
        nearest = nearest_kept(ctx, kept).gather(1, partner)  # of a partner that was lost, with what went into it
        match = torch.where(nearest < 0, partner, nearest)
        return merge_into(ctx, kept, dropped, match, self.proportional, ranked)

    def _run_stages(self, ctx: AttentionContext, removed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``[B, N]``, minus infinity for what S removed; the positions of that, and of its partners."""
        feature = stages.feature_of(ctx, self.feature)
        if stages.needs_scores(self.partition) and not ctx.has_dense_bias:
            q, k = ctx.biased()
            class_start = stages.starts_at_class(ctx, self.start)
            iters = self.iterations(ctx.layer, ctx.depth)
            return ops.zero_tprune(q, k, feature, ctx.scale / self.tau, removed, class_start, iters, self.tol,
                                   self.vmin, self.vmax, ctx.num_prefix, self.partition, self.metric)  # fmt: skip
        rough = self.scores(ctx, iters=1) if stages.needs_scores(self.partition) else None
        similar, match, rest = stages.similar_tokens(ctx, feature, rough, removed, self.partition, self.metric)
        left = self.scores(ctx, among=rest)
        return spread(left, rest, ctx.x.shape[1], ctx.num_prefix), similar, match

    def scores(self, ctx: AttentionContext, iters: int | None = None, among: Tensor | None = None) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64); ``among`` as in ``AttentionContext.page_rank``."""
        iters = self.iterations(ctx.layer, ctx.depth) if iters is None else iters
        tokens = ctx.x.shape[1] if among is None else ctx.num_prefix + among.shape[1]
        ranks = ctx.page_rank(stages.start_scores(ctx, self.start, tokens), iters, self.tol, self.tau, among)
        return ops.head_aggregate(ranks, self.vmin, self.vmax, ctx.num_prefix)

    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        """Attention is formed once for I' and once for I; every iteration reads it once."""
        patches = tokens - host.num_prefix_tokens
        removed = self._removed_by_similarity(patches, keep)
        product = cost.heads * cost.head_dim
        rough = tokens**2 * (product + cost.heads) if removed and stages.needs_scores(self.partition) else 0
        pairs = stages.pairing_macs(cost, self.feature, patches) if removed else 0
        fine = (tokens - removed) ** 2 * (product + self.iterations(layer, host.depth) * cost.heads)
        return rough + pairs + fine + (merging_macs(cost, patches, keep) if self.reduction == "merge" else 0)

    def _removed_by_similarity(self, patches: int, keep: int) -> int:
        wanted = 10 if self.similar is None else self.similar
        return min(wanted, patches - keep, patches // 2)
