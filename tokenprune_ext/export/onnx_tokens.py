"""Ranking, matching and merging tokens, as arithmetic that ONNX run times have and fuse; see ``onnx_ops``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune_ext.ops._check import accumulate_dtype
from tokenprune_ext.ops._similarity import MIN_NORM, pairwise, sum_heads


def ascending(index: Tensor, ordered: bool) -> Tensor:
    """Positions ``[B, K]`` in ascending order, or as they are where no one asks for an order."""
    # Ranked as floats, which hold them exactly: few run times rank integers.
    return index.to(torch.float32).topk(index.shape[1], 1, largest=False).values.to(index.dtype) if ordered else index


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, K]`` of ``x`` ``[B, N, C]``."""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return torch.nn.functional.embedding(index + first, x.flatten(0, 1))


def with_prefix(kept: Tensor, num_prefix: int) -> Tensor:
    """The positions of the prefix tokens, and those in ``kept`` ``[B, K]``."""
    return torch.cat([torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1), kept], 1)


def marked(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """1 at the positions ``index`` ``[B, K]`` of ``count``, else 0; ``[B, count]``."""
    places = torch.arange(count, device=index.device)
    return (index.unsqueeze(2) == places).to(dtype).amax(1)


def topk_gather(
    ordered: bool, x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0, fuse: str = "none"
) -> tuple[Tensor, Tensor]:
    patches = x.shape[1] - num_prefix
    fused = fuse != "none" and keep < patches
    ranked, order = scores[:, num_prefix:].topk(patches if fused else keep, 1)
    order = order + num_prefix
    kept = ascending(order[:, :keep], ordered)
    tokens = take(x, with_prefix(kept, num_prefix))
    if not fused:
        return tokens, kept
    others = take(x, order[:, keep:]).to(accumulate_dtype(x.dtype))
    weights = ranked[:, keep:].to(others.dtype).unsqueeze(1)
    extra = others.mean(1, keepdim=True) if fuse == "mean" else weights @ others
    return torch.cat([tokens, extra.to(x.dtype)], 1), kept


def quantile_gather(
    ordered: bool, x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    sums = scores[:, num_prefix:].to(wide).clamp_min(0).cumsum(1)
    patches = sums.shape[1]
    quantile = torch.arange(keep, device=x.device).to(wide) + 0.5
    before = sums.unsqueeze(1) * keep < (sums[:, -1:] * quantile).unsqueeze(2)
    sampled = marked(before.to(torch.int64).sum(2), patches, wide)
    # The sampled tokens first, then the lowest positions.
    place = torch.arange(patches, device=x.device).to(wide)
    kept = ascending((sampled * patches - place).topk(keep, 1).indices, ordered)
    sizes = pad(sampled.gather(1, kept), (num_prefix, 0), value=1.0)
    kept = kept + num_prefix
    return take(x, with_prefix(kept, num_prefix)), kept, sizes, sizes.log().to(x.dtype)[:, None, None]


def _rows(metric: Tensor, similarity: str) -> Tensor:
    wide = metric.to(accumulate_dtype(metric.dtype))
    if similarity != "cosine":
        return wide
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(MIN_NORM)


def peaks_match(
    ordered: bool,
    metric: Tensor,
    importance: Tensor,
    keep: int,
    num_prefix: int = 0,
    exponent: float = 1.0,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, importance = _rows(metric[:, num_prefix:], "cosine"), importance[:, num_prefix:]
    pairs = pairwise(rows, rows, "cosine")
    more_important = importance.unsqueeze(1) > importance.unsqueeze(2)
    near = torch.where(more_important, pairs, -1.0).amax(2)
    score = (importance if exponent == 1 else importance**exponent) * (1 - near)
    patches = score.shape[1]
    order = score.topk(patches, 1).indices
    kept, dropped = ascending(order[:, :keep], ordered), order[:, keep:]
    if keep == patches:
        match = dropped
    else:  # 4 below: less than any cosine of a token that stays
        match = (take(pairs, dropped) - 4 * marked(dropped, patches, pairs.dtype).unsqueeze(1)).argmax(2)
    return pad(score, (num_prefix, 0)), kept + num_prefix, dropped + num_prefix, match + num_prefix


def nearest_token(
    metric: Tensor, rank: Tensor, num_prefix: int = 0, similarity: str = "cosine", allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    rows, rank = _rows(metric[:, num_prefix:], similarity), rank[:, num_prefix:]
    least = torch.finfo(rows.dtype).min
    pairs = torch.where(rank.unsqueeze(1) < rank.unsqueeze(2), pairwise(rows, rows, similarity), least)
    best, index = pairs.max(2)
    found = best > least
    index = torch.where(found, index + num_prefix, -1)
    return pad(torch.where(found, best, -1.0), (num_prefix, 0), value=-1.0), pad(index, (num_prefix, 0), value=-1)


def _groups(
    metric: Tensor, scores: Tensor | None, num_prefix: int, partition: str
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Positions among the patch tokens of group A, which may be dropped, and of B; and what they are compared by."""
    if scores is None:
        return None, None, metric[:, ::2], metric[:, 1::2]
    patches = metric.shape[1]
    important = patches // 2 if partition == "unimportant" else patches - patches // 2
    order = scores[:, num_prefix:].topk(patches, 1).indices
    upper, lower = order[:, :important], order[:, important:]
    a, b = (lower, upper) if partition == "unimportant" else (upper, lower)
    return a, b, take(metric, a), take(metric, b)


def bipartite_match(
    ordered: bool,
    metric: Tensor,
    scores: Tensor | None,
    r: int,
    num_prefix: int = 0,
    partition: str = "alternate",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    metric = sum_heads(metric)
    patches = metric.shape[1] - num_prefix
    group_a, group_b, rows_a, rows_b = _groups(_rows(metric[:, num_prefix:], similarity), scores, num_prefix, partition)
    best, partner = pairwise(rows_a, rows_b, similarity).max(2)
    order = best.topk(best.shape[1], 1).indices
    chosen = partner.gather(1, order[:, :r])
    if group_a is None or group_b is None:
        a, match = 2 * order, 2 * chosen + 1
        b = torch.arange(1, patches, 2, device=metric.device).expand(metric.shape[0], -1)
    else:
        a, match, b = group_a.gather(1, order), group_b.gather(1, chosen), group_b
    kept = ascending(torch.cat([a[:, r:], b], 1), ordered)
    return a[:, :r] + num_prefix, match + num_prefix, kept + num_prefix


def merge_tokens(
    x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    stay = with_prefix(kept, num_prefix)
    own, given = (take(x, index).to(accumulate_dtype(x.dtype)) for index in (stay, dropped))
    weight = (stay.unsqueeze(2) == match.unsqueeze(1)).to(own.dtype)  # [B, P, R]: what goes where
    if size is None:
        sizes = 1 + weight.sum(2)
        own_share = sizes.reciprocal()
    else:
        own_size, weight = size.gather(1, stay), weight * size.gather(1, dropped).unsqueeze(1)
        sizes = own_size + weight.sum(2)
        own_share = own_size / sizes
    merged = own * own_share.unsqueeze(2) + (weight / sizes.unsqueeze(2)) @ given
    return merged.to(x.dtype), sizes, sizes.log().to(x.dtype).unsqueeze(1).unsqueeze(1)
