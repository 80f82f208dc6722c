"""The stages of Zero-TPrune: where page rank starts, and which tokens are most like one of another half."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_int
from tokenprune_ext.ops._similarity import SIMILARITIES
from tokenprune_ext.ops.zero_tprune import start_scores as class_start
from tokenprune_ext.patch.context import AttentionContext

from .random import random_scores

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost

PARTITIONS = ("unimportant", "important", "alternate", "random")
FEATURES = ("key", "key_heads", "query", "value", "hidden")
METRICS = SIMILARITIES


def checked_iters(iters: object) -> tuple[int, ...]:
    """Iterations in the first, the middle and the last blocks, as a tuple: JSON has lists only."""
    if not isinstance(iters, list | tuple) or len(iters) != 3:
        raise ValueError(f"iters must be three counts (first, middle, last blocks), got {iters!r}")
    for count in iters:
        check_int("iters", count, 1)
    return tuple(iters)


def starts_at_class(ctx: AttentionContext, start: str) -> bool:
    """Whether page rank begins with more for the class token than for the others."""
    return start != "uniform" and ctx.has_class_token


def start_scores(ctx: AttentionContext, start: str, tokens: int) -> Tensor | None:
    """The scores that page rank of ``tokens`` tokens begins with; None for ones."""
    return class_start(ctx.q, tokens) if starts_at_class(ctx, start) else None


def needs_scores(partition: str) -> bool:
    """Whether the halves are made by importance."""
    return partition in ("unimportant", "important")


def similar_tokens(
    ctx: AttentionContext, feature: Tensor, scores: Tensor | None, count: int, partition: str, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of ``count`` tokens to remove, of their partners, and of all other patch tokens.

    Args:
        ctx: the block.
        feature: what is compared, see :func:`feature_of`.
        scores: importance ``[B, N]``, for the partitions that need it.
        count: tokens to remove.
        partition: one of ``PARTITIONS``, see :class:`ZeroTPrune`.
        metric: one of ``METRICS``.
    """
    if partition == "random":
        scores, partition = random_scores(ctx, seed=0), "unimportant"
    return ops.bipartite_match(feature, scores, count, ctx.num_prefix, partition, metric)


def pairing_macs(cost: BlockCost, feature: str, patches: int) -> int:
    """MACs of comparing the two halves of ``patches`` tokens."""
    width = {"hidden": cost.channels, "key_heads": cost.heads * cost.head_dim}.get(feature, cost.head_dim)
    return (patches // 2) * (patches - patches // 2) * width


def feature_of(ctx: AttentionContext, name: str) -> Tensor:
    """What S compares, by its name in ``FEATURES``."""
    if name == "hidden":
        return ctx.x
    if name == "key_heads":
        return ctx.k.transpose(1, 2).flatten(2)
    return {"key": ctx.k, "query": ctx.q, "value": ctx.v}[name]  # compared by its sum over the heads
