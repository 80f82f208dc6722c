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
from tokenprune_ext.ops.class_attention import reference as class_attention
from tokenprune_ext.ops.head_reduced_sum import reference as head_reduced_sum
from tokenprune_ext.ops.zero_tprune import spread, start_scores

from .onnx_tokens import (
    ascending,
    bipartite_match,
    marked,
    merge_tokens,
    nearest_token,
    peaks_match,
    quantile_gather,
    take,
    topk_gather,
    with_prefix,
)

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
        own.bipartite_match.default: partial(bipartite_match, ordered),
        own.class_attention.default: class_attention,
        own.head_aggregate.default: _head_aggregate,
        own.head_reduced_sum.default: head_reduced_sum,
        own.merge_tokens.default: merge_tokens,
        own.nearest_token.default: nearest_token,
        own.peaks_match.default: partial(peaks_match, ordered),
        own.quantile_gather.default: partial(quantile_gather, ordered),
        own.topk_gather.default: partial(topk_gather, ordered),
        own.wpr.default: _wpr,
        own.wpr_qk.default: _wpr_qk,
        own.zero_tprune.default: partial(_zero_tprune, ordered),
        aten.cumsum.default: _cumsum,
        aten.scaled_dot_product_attention.default: _attention,
        aten.scatter.src: _scatter,
        aten.scatter.value: _mark,
        aten.sort.default: partial(_sort, ordered),
        aten.sort.stable: partial(_stable_sort, ordered),
    }


def _sort(ordered: bool, values: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    if values.is_floating_point():
        return values.topk(values.shape[dim], dim, largest=descending)
    # Integers that are sorted here are positions of tokens, and nobody looks at where they came from.
    return ascending(values, ordered), values


def _stable_sort(
    ordered: bool, values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return _sort(ordered, values, dim, descending)  # TopK of ONNX takes the lower of equal positions first


def _mark(values: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """``scatter`` of one value, into a matrix."""
    if values.dim() != 2 or dim not in (1, -1):
        return NotImplemented
    return torch.where(marked(index, values.shape[1], torch.float32) > 0, value, values)


def _scatter(values: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``scatter`` of finite floats into a matrix, none twice to one place."""
    if values.dim() != 2 or dim not in (1, -1) or index.shape != source.shape or not source.is_floating_point():
        return NotImplemented
    hit = (index.unsqueeze(2) == torch.arange(values.shape[1], device=index.device)).to(source.dtype)
    return torch.where(hit.amax(1) > 0, (source.unsqueeze(1) @ hit).squeeze(1), values)


def _cumsum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Counts as floats, which hold them exactly: TensorRT does not add up integers."""
    if dtype is not None or values.is_floating_point():
        return NotImplemented
    return values.to(torch.float32).cumsum(dim).to(torch.int64)


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
    among: Tensor | None = None,
    num_prefix: int = 0,
    allow_tf32: bool = False,
) -> Tensor:
    if among is not None:
        q, k = (_take_of_heads(part, with_prefix(among, num_prefix)) for part in (q, k))
    return _wpr(probabilities(q, k, scale), start, max_iters, tol)


def _take_of_heads(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``[B, K]`` of every head of ``x`` ``[B, H, N, d]``."""
    heads = x.shape[1]
    return take(x.transpose(1, 2).flatten(2), index).unflatten(2, (heads, -1)).transpose(1, 2)


def _head_aggregate(scores: Tensor, vmin: float = 0.01, vmax: float = 0.7, num_prefix: int = 0) -> Tensor:
    patches = scores[..., num_prefix:].to(accumulate_dtype(scores.dtype))
    variance = (patches - patches.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    passes = ((vmin <= variance) & (variance <= vmax)).to(patches.dtype)
    weight = torch.where(passes.sum(1, keepdim=True) > 0, passes, 1.0)
    return pad(((weight * patches.square()).sum(1) / weight.sum(1)).sqrt(), (num_prefix, 0))


def _zero_tprune(
    ordered: bool,
    q: Tensor,
    k: Tensor,
    metric: Tensor,
    scale: float,
    r: int,
    class_start: bool = False,
    max_iters: int = 30,
    tol: float = 1e-6,
    vmin: float = 0.01,
    vmax: float = 0.7,
    num_prefix: int = 0,
    partition: str = "unimportant",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = q.shape[2]
    start = [start_scores(q, count) if class_start else None for count in (tokens, tokens - r)]
    rough = _head_aggregate(_wpr_qk(q, k, scale, start[0], 1), vmin, vmax, num_prefix)
    dropped, match, kept = bipartite_match(ordered, metric, rough, r, num_prefix, partition, similarity)
    left = _wpr_qk(q, k, scale, start[1], max_iters, tol, kept, num_prefix)
    return spread(_head_aggregate(left, vmin, vmax, num_prefix), kept, tokens, num_prefix), dropped, match
