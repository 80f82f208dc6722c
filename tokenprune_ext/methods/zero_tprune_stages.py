"""The stages of Zero-TPrune: where page rank starts, and which tokens are most like one of another half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_int
from tokenprune_ext.ops._similarity import SIMILARITIES
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


def start_scores(ctx: AttentionContext, start: str, tokens: int) -> Tensor | None:
    """The scores that page rank of ``tokens`` tokens begins with, the class token's the root of their number times the
    others'; None for ones."""
    if start == "uniform" or not ctx.has_class_token:
        return None
    dtype = torch.promote_types(ctx.q.dtype, torch.float32)
    return torch.constant_pad_nd(torch.ones(tokens - 1, dtype=dtype, device=ctx.x.device), (1, 0), tokens**0.5)


def needs_scores(partition: str) -> bool:
    """Whether the halves are made by importance."""
    return partition in ("unimportant", "important")


def similar_tokens(
    ctx: AttentionContext, scores: Tensor | None, count: int, partition: str, feature: str, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of ``count`` tokens to remove, of their partners, and of all other patch tokens.

    Args:
        ctx: the block.
        scores: importance ``[B, N]``, for the partitions that need it.
        count: tokens to remove.
        partition: one of ``PARTITIONS``, see :class:`ZeroTPrune`.
        feature: one of ``FEATURES``.
        metric: one of ``METRICS``.
    """
    if partition == "random":
        scores, partition = random_scores(ctx, seed=0), "unimportant"
    return ops.bipartite_match(_feature(ctx, feature), scores, count, ctx.num_prefix, partition, metric)


def pairing_macs(cost: BlockCost, feature: str, patches: int) -> int:
    """MACs of comparing the two halves of ``patches`` tokens."""
    width = {"hidden": cost.channels, "key_heads": cost.heads * cost.head_dim}.get(feature, cost.head_dim)
    return (patches // 2) * (patches - patches // 2) * width


def _feature(ctx: AttentionContext, name: str) -> Tensor:
    if name == "hidden":
        return ctx.x
    if name == "key_heads":
        return ctx.k.transpose(1, 2).flatten(2)
    return {"key": ctx.k, "query": ctx.q, "value": ctx.v}[name]  # compared by its sum over the heads
