"""The library's operators, and a few of torch's, as arithmetic that ONNX run times have and fuse.

Each gives what the operator gives, but for ties between floats that rounding decides, and for NaN, which is not looked
for. Written for graphs: one ``TopK`` ranks, rows are taken by a plain ``Gather`` over the tokens of all images (indices
for every channel, as in ``GatherElements``, cost more than the copy), masks and merging are comparisons and products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune_ext.ops._check import accumulate_dtype
from tokenprune_ext.ops._heads import reduce_heads
from tokenprune_ext.ops._qk import probabilities
from tokenprune_ext.ops._similarity import MIN_NORM, pairwise
from tokenprune_ext.ops.class_attention import reference as class_attention
from tokenprune_ext.ops.head_reduced_sum import reference as head_reduced_sum

Decompositions = dict[Any, Callable[..., Any]]


def decompositions(ordered: bool) -> Decompositions:
    """What replaces each operator, for ``ExportedProgram.run_decompositions``.

    Args:
        ordered: whether kept tokens have to stay in their original order. Without it they come in the order of their
            scores, which saves one more ``TopK`` a layer.
    """
    own, aten = torch.ops.tokenprune, torch.ops.aten
    return {
        own.attn_colsum.default: _attn_colsum,
        own.attn_colsum_qk.default: _attn_colsum_qk,
        own.bipartite_match.default: partial(_bipartite_match, ordered),
        own.class_attention.default: class_attention,
        own.head_aggregate.default: _head_aggregate,
        own.head_reduced_sum.default: head_reduced_sum,
        own.merge_tokens.default: _merge_tokens,
        own.nearest_token.default: _nearest_token,
        own.peaks_match.default: partial(_peaks_match, ordered),
        own.topk_gather.default: partial(_topk_gather, ordered),
        own.wpr.default: _wpr,
        own.wpr_qk.default: _wpr_qk,
        aten.cumsum.default: _cumsum,
        aten.scaled_dot_product_attention.default: _attention,
        aten.scatter.value: _mark,
        aten.searchsorted.Tensor: _searchsorted,
        aten.sort.default: partial(_sort, ordered),
        aten.sort.stable: partial(_stable_sort, ordered),
    }


# Selection


def _ascending(index: Tensor, ordered: bool) -> Tensor:
    """Positions ``[B, K]`` in ascending order, or as they are where no one asks for an order."""
    # Ranked as floats, which hold them exactly: few run times rank integers.
    return index.to(torch.float32).topk(index.shape[1], 1, largest=False).values.to(index.dtype) if ordered else index


def _take(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, K]`` of ``x`` ``[B, N, C]``."""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return torch.nn.functional.embedding(index + first, x.flatten(0, 1))


def _with_prefix(kept: Tensor, num_prefix: int) -> Tensor:
    """The positions of the prefix tokens, and those in ``kept`` ``[B, K]``."""
    return torch.cat([torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1), kept], 1)


def _marked(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """1 at the positions ``index`` ``[B, K]`` of ``count``, else 0; ``[B, count]``."""
    places = torch.arange(count, device=index.device)
    return (index.unsqueeze(2) == places).to(dtype).amax(1)


def _topk_gather(
    ordered: bool, x: Tensor, scores: Tensor, keep: int, num_prefix: int = 0, fuse: str = "none"
) -> tuple[Tensor, Tensor]:
    patches = x.shape[1] - num_prefix
    fused = fuse != "none" and keep < patches
    ranked, order = scores[:, num_prefix:].topk(patches if fused else keep, 1)
    order = order + num_prefix
    kept = _ascending(order[:, :keep], ordered)
    tokens = _take(x, _with_prefix(kept, num_prefix))
    if not fused:
        return tokens, kept
    others = _take(x, order[:, keep:]).to(accumulate_dtype(x.dtype))
    weights = ranked[:, keep:].to(others.dtype).unsqueeze(1)
    extra = others.mean(1, keepdim=True) if fuse == "mean" else weights @ others
    return torch.cat([tokens, extra.to(x.dtype)], 1), kept


def _sort(ordered: bool, values: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    if values.is_floating_point():
        return values.topk(values.shape[dim], dim, largest=descending)
    # Integers that are sorted here are positions of tokens, and nobody looks at where they came from.
    return _ascending(values, ordered), values


def _stable_sort(
    ordered: bool, values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return _sort(ordered, values, dim, descending)  # TopK of ONNX takes the lower of equal positions first


def _mark(values: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """``scatter`` of one value, into a matrix."""
    if values.dim() != 2 or dim not in (1, -1):
        return NotImplemented
    return torch.where(_marked(index, values.shape[1], torch.float32) > 0, value, values)


def _cumsum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Counts as floats, which hold them exactly: TensorRT does not add up integers."""
    if dtype is not None or values.is_floating_point():
        return NotImplemented
    return values.to(torch.float32).cumsum(dim).to(torch.int64)


def _searchsorted(
    sorted_sequence: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    if out_int32 or right or side == "right" or sorter is not None:
        return NotImplemented
    return (sorted_sequence.unsqueeze(-2) < values.unsqueeze(-1)).to(torch.int64).sum(-1)


# Attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As :func:`probabilities` forms it, so that scores and the output of the heads share one matrix."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return NotImplemented
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ value


def _attn_colsum(attn: Tensor, head_reduce: str = "mean", query_rows: str = "all", num_prefix: int = 0) -> Tensor:
    first, last = {"all": (0, None), "patch": (num_prefix, None), "cls": (0, 1)}[query_rows]
    rows = attn[:, :, first:last].to(accumulate_dtype(attn.dtype))
    return pad(reduce_heads(rows, head_reduce).sum(1)[:, num_prefix:], (num_prefix, 0))


def _attn_colsum_qk(
    q: Tensor,
    k: Tensor,
    scale: float,
    head_reduce: str = "mean",
    query_rows: str = "all",
    num_prefix: int = 0,
    lse: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    return _attn_colsum(probabilities(q, k, scale, lse), head_reduce, query_rows, num_prefix)


def _wpr(attn: Tensor, start: Tensor | None = None, max_iters: int = 30, tol: float = 1e-6) -> Tensor:
    """All ``max_iters`` iterations: none is left out, whatever ``tol`` says."""
    attn = attn.to(accumulate_dtype(attn.dtype))
    ones = torch.ones_like(attn[..., :1, :])
    scores = ones if start is None else ones * start.unsqueeze(-2)
    for _ in range(max_iters):
        scores = scores @ attn
    return scores.squeeze(-2)


def _wpr_qk(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    allow_tf32: bool = False,
) -> Tensor:
    return _wpr(probabilities(q, k, scale), start, max_iters, tol)


def _head_aggregate(scores: Tensor, vmin: float = 0.01, vmax: float = 0.7, num_prefix: int = 0) -> Tensor:
    patches = scores[..., num_prefix:].to(accumulate_dtype(scores.dtype))
    variance = (patches - patches.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    passes = ((vmin <= variance) & (variance <= vmax)).to(patches.dtype)
    weight = torch.where(passes.sum(1, keepdim=True) > 0, passes, 1.0)
    return pad(((weight * patches.square()).sum(1) / weight.sum(1)).sqrt(), (num_prefix, 0))


# Similarity


def _rows(metric: Tensor, similarity: str) -> Tensor:
    wide = metric.to(accumulate_dtype(metric.dtype))
    if similarity != "cosine":
        return wide
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(MIN_NORM)


def _peaks_match(
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
    kept, dropped = _ascending(order[:, :keep], ordered), order[:, keep:]
    if keep == patches:
        match = dropped
    else:  # 4 below: less than any cosine of a token that stays
        match = (_take(pairs, dropped) - 4 * _marked(dropped, patches, pairs.dtype).unsqueeze(1)).argmax(2)
    return pad(score, (num_prefix, 0)), kept + num_prefix, dropped + num_prefix, match + num_prefix


def _nearest_token(
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
    return a, b, _take(metric, a), _take(metric, b)


def _bipartite_match(
    ordered: bool,
    metric: Tensor,
    scores: Tensor | None,
    r: int,
    num_prefix: int = 0,
    partition: str = "alternate",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
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
    kept = _ascending(torch.cat([a[:, r:], b], 1), ordered)
    return a[:, :r] + num_prefix, match + num_prefix, kept + num_prefix


def _merge_tokens(
    x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor]:
    stay = _with_prefix(kept, num_prefix)
    own, given = (_take(x, index).to(accumulate_dtype(x.dtype)) for index in (stay, dropped))
    weight = (stay.unsqueeze(2) == match.unsqueeze(1)).to(own.dtype)  # [B, P, R]: what goes where
    if size is None:
        sizes = 1 + weight.sum(2)
        own_share = sizes.reciprocal()
    else:
        own_size, weight = size.gather(1, stay), weight * size.gather(1, dropped).unsqueeze(1)
        sizes = own_size + weight.sum(2)
        own_share = own_size / sizes
    merged = own * own_share.unsqueeze(2) + (weight / sizes.unsqueeze(2)) @ given
    return merged.to(x.dtype), sizes
