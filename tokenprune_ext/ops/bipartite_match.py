"""Bipartite matching: the most similar pairs between two groups of tokens (ToMe; Zero-TPrune, similarity stage)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice, check_int

from ._check import check_floating
from ._define import define
from ._select import split
from ._similarity import check_metric, compared_rows, pairwise, sum_heads, take_rows, tf32_allowed

PARTITIONS = ("alternate", "unimportant", "important")


def _check_scores(metric: Tensor, scores: Tensor | None, partition: str) -> None:
    if partition == "alternate":
        if scores is not None:
            raise ValueError("scores must be None with partition='alternate', which does not look at them")
        return
    if scores is None:
        raise ValueError(f"partition={partition!r} needs scores [B, N], got None")
    check_floating("scores", scores, "[B, N]")
    batch, tokens = metric.shape[0], metric.shape[-2]
    if scores.shape != (batch, tokens):
        raise ValueError(f"scores must have shape [{batch}, {tokens}] to go with metric {list(metric.shape)}, "
                         f"got {list(scores.shape)}")  # fmt: skip
    if scores.device != metric.device:
        raise ValueError(f"scores must be on the device of metric, {metric.device}, got {scores.device}")


def _check(metric: Tensor, scores: Tensor | None, r: int, num_prefix: int, partition: str, similarity: str) -> None:
    check_metric(metric, similarity, heads=True)
    check_choice("partition", partition, PARTITIONS)
    _check_scores(metric, scores, partition)
    check_int("num_prefix", num_prefix, 0, metric.shape[-2], "the number of tokens")
    patches = metric.shape[-2] - num_prefix
    if patches < 2:
        check_int("r", r, 0, 0, f"there is nobody to match with among {patches} patch tokens")
    check_int("r", r, 0, (patches + 1) // 2, f"the larger half of {patches} patch tokens")


def _groups(metric: Tensor, scores: Tensor | None, num_prefix: int, partition: str) -> tuple[Tensor, Tensor]:
    """Positions of group A, which may be dropped, and of group B, each ascending."""
    batch, tokens, _ = metric.shape
    if scores is None:
        position = torch.arange(num_prefix, tokens, device=metric.device).expand(batch, -1)
        return position[:, ::2], position[:, 1::2]
    patches = tokens - num_prefix
    important = patches // 2 if partition == "unimportant" else patches - patches // 2
    upper, lower = split(scores, important, num_prefix)
    return (lower, upper) if partition == "unimportant" else (upper, lower)


def reference(
    metric: Tensor,
    scores: Tensor | None,
    r: int,
    num_prefix: int = 0,
    partition: str = "alternate",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain torch, by way of all similarities between the groups."""
    _check(metric, scores, r, num_prefix, partition, similarity)
    metric = sum_heads(metric)
    group_a, group_b = _groups(metric, scores, num_prefix, partition)
    if r == 0:
        empty = group_a.new_empty((metric.shape[0], 0))
        return empty, empty.clone(), torch.cat([group_a, group_b], 1).sort(1).values
    rows, _ = compared_rows(metric, similarity)
    pairs = pairwise(take_rows(rows, group_a), take_rows(rows, group_b), similarity)
    # Nothing is left of a row of minus infinities: the first of group B is its maximum.
    best, partner = pairs.masked_fill(pairs.isnan(), -math.inf).max(2)
    order = torch.sort(-best, dim=1, stable=True).indices
    chosen = order[:, :r].sort(1).values
    kept = torch.cat([group_a.gather(1, order[:, r:]), group_b], 1).sort(1).values
    return group_a.gather(1, chosen), group_b.gather(1, partner.gather(1, chosen)), kept


def _fake(
    metric: Tensor,
    scores: Tensor | None,
    r: int,
    num_prefix: int = 0,
    partition: str = "alternate",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(metric, scores, r, num_prefix, partition, similarity)
    batch, tokens = metric.shape[0], metric.shape[-2]
    dropped, match = (metric.new_empty((batch, r), dtype=torch.int64) for _ in range(2))
    return dropped, match, metric.new_empty((batch, tokens - num_prefix - r), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("bipartite_match returns positions, which have no gradient")


def _macs(given: Mapping[str, Any]) -> int:
    batch, *_, tokens, channels = given["metric"]
    patches = tokens - given["num_prefix"]
    return batch * channels * (patches // 2) * (patches - patches // 2)


_op = define(
    "bipartite_match(Tensor metric, Tensor? scores, int r, int num_prefix=0, "
    'str partition="alternate", str similarity="cosine", bool allow_tf32=False) -> (Tensor, Tensor, Tensor)',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=_macs,
)


def bipartite_match(
    metric: Tensor,
    scores: Tensor | None,
    r: int,
    num_prefix: int = 0,
    partition: str = "alternate",
    similarity: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the patch tokens into groups A and B, and find the ``r`` tokens of A most similar to one of B.

    Every token of A is paired with its most similar token of B; the ``r`` most similar pairs are returned. Equal
    similarities: the lower position wins, among partners and among pairs. Each image is decided on its own. A token of
    B that ``nearest_token`` would leave out (NaN, infinities, norms out of range) is matched by none; a token of A that
    finds no partner comes after all others, and then gets the first of B. tf32 as in ``nearest_token``.

    Args:
        metric: what is compared, ``[B, N, D]``; float16, bfloat16, float32 or float64. Or vectors of every head, e.g.
            keys, ``[B, H, N, D]``: then their sums over the heads, formed and compared in float32 (float64 when
            ``metric`` is). No similarity orders means differently. Views of a packed qkv tensor are not copied.
        scores: importance ``[B, N]``, any floating dtype; the entries of the prefix tokens are ignored. Higher is more
            important, then the lower position; NaN is least important. None for ``alternate``.
        r: pairs to return, at most the size of A; 0 when there is no token in B.
        num_prefix: prefix tokens (class, distillation, registers) in front; in no group.
        partition: ``alternate``: A is every other patch token from the first on (ToMe). ``unimportant``: A is the less
            important half (sequential-U). ``important``: A is the more important half (sequential-I). An odd token
            goes to A.
        similarity: ``cosine``, ``dot`` or ``euclidean``, see ``nearest_token``.

    Returns:
        ``(dropped, match, kept)``, int64 positions in ``metric``: ``dropped`` ``[B, r]`` of A, ascending; ``match``
        ``[B, r]``, the partner of each in B; ``kept`` ``[B, N - num_prefix - r]``, the other patch tokens, ascending.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together or are empty, ``r`` or ``num_prefix`` is out of range, ``partition`` or
            ``similarity`` is unknown, or ``scores`` are missing or not wanted.

    Source: ToMe (ICLR 2023), section 3 (``alternate``); Zero-TPrune (CVPR 2024), section 3.3 (the others).
    """
    return _op(metric, scores, r, num_prefix, partition, similarity, tf32_allowed(metric, similarity))
