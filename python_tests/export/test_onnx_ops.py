"""The formulations for ONNX give what the operators give, whether or not tokens stay in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune_ext.export.onnx_ops import decompositions
from tokenprune_ext.ops._similarity import SIMILARITIES
from tokenprune_ext.ops.bipartite_match import PARTITIONS

IN_ORDER, FREE = decompositions(True), decompositions(False)
BATCH, TOKENS, HEADS = 3, 23, 4
own, aten = torch.ops.tokenprune, torch.ops.aten


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QK = [random(BATCH, HEADS, TOKENS, 8, seed=seed) for seed in (1, 2)]
X, SCORES = random(BATCH, TOKENS, 12, seed=3), random(BATCH, TOKENS, seed=4)
SIZE = random(BATCH, TOKENS, seed=5).abs() + 1
ATTENTION = (QK[0] @ QK[1].mT).softmax(-1)


def check(op: torch._ops.OpOverload, *arguments: object, **options: object) -> None:
    torch.testing.assert_close(IN_ORDER[op](*arguments, **options), op(*arguments, **options))


def test_every_operator_has_one():
    names = {
        name.removeprefix("tokenprune::") for name in torch._C._dispatch_get_all_op_names() if "tokenprune::" in name
    }
    assert names == {str(op).split(".")[1] for op in IN_ORDER if str(op).startswith("tokenprune")}


@pytest.mark.parametrize("head_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("query_rows", ["all", "patch", "cls"])
def test_attention_received(head_reduce, query_rows):
    check(own.attn_colsum.default, ATTENTION, head_reduce, query_rows, 2)
    check(own.attn_colsum_qk.default, *QK, 0.3, head_reduce, query_rows, 2)


def test_class_attention():
    bias = random(1, 1, 1, TOKENS)
    check(own.class_attention.default, *QK, None, None, 0.3, "mean")
    check(own.class_attention.default, *QK, random(BATCH, HEADS, TOKENS, 8), bias, 0.3, "sum")
    check(own.head_reduced_sum.default, QK[0], "max")


@pytest.mark.parametrize("start", [None, random(TOKENS).abs(), random(BATCH, HEADS, TOKENS).abs()])
def test_page_rank(start):
    for iterations in (0, 1, 4):
        check(own.wpr.default, ATTENTION, start, iterations, 0.0)
        check(own.wpr_qk.default, *QK, 0.3, start, iterations, 0.0)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_page_rank_among_some(num_prefix):
    among = torch.tensor([[2, 3, 7, 20], [4, 5, 6, 22], [2, 9, 11, 12]])
    for start in (None, random(num_prefix + 4).abs(), random(BATCH, HEADS, num_prefix + 4).abs()):
        check(own.wpr_qk.default, *QK, 0.3, start, 4, 0.0, among, num_prefix)


def test_head_filter():
    ranks = 1 + random(BATCH, HEADS, TOKENS) * torch.tensor([0.01, 0.3, 0.5, 3.0]).double()[:, None]
    for vmin, vmax in ((0.01, 0.7), (0.0, 100.0), (50.0, 60.0)):  # some heads, all, none
        check(own.head_aggregate.default, ranks, vmin, vmax, 1)


@pytest.mark.parametrize("fuse", ["none", "mean", "weighted"])
@pytest.mark.parametrize("keep", [1, 9, TOKENS - 2])
def test_selection(fuse, keep):
    check(own.topk_gather.default, X, SCORES, keep, 2, fuse)
    tokens, kept = FREE[own.topk_gather.default](X, SCORES, keep, 2, fuse)
    expected, index = own.topk_gather(X, SCORES, keep, 2, fuse)
    order = kept.argsort(1)
    assert torch.equal(kept.gather(1, order), index)
    tokens[:, 2 : 2 + keep] = tokens[:, 2 : 2 + keep].gather(1, order.unsqueeze(-1).expand(-1, -1, X.shape[-1]))
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize("keep", [1, 9, TOKENS - 2])
def test_quantiles(keep):
    op, scores = own.quantile_gather.default, SCORES.exp()
    scores[0, 5:] = 0
    check(op, X, scores, keep, 2)
    check(op, X, torch.zeros_like(scores), keep, 2)
    tokens, index, sizes, log_sizes = FREE[op](X, scores, keep, 2)
    order = torch.cat([torch.tensor([[0, 1]] * BATCH), index.argsort(1) + 2], 1)
    ranked = (tokens[torch.arange(BATCH)[:, None], order], index.sort(1).values, sizes.gather(1, order))
    torch.testing.assert_close(ranked, op(X, scores, keep, 2)[:3])
    torch.testing.assert_close(log_sizes, sizes.log()[:, None, None])


def partners(dropped: Tensor, match: Tensor) -> Tensor:
    """For every token the one it goes into, itself for others; ``[B, N]``."""
    return torch.arange(TOKENS).expand(BATCH, -1).scatter(1, dropped, match)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("r", [0, 4, 11])
def test_pairs(partition, similarity, r):
    op = own.bipartite_match.default
    for metric in (X, QK[1]):
        arguments = (metric, None if partition == "alternate" else SCORES, r, 1, partition, similarity)
        dropped, match, kept = op(*arguments)
        for formulation, in_order in ((IN_ORDER[op], True), (FREE[op], False)):
            found = formulation(*arguments)
            assert torch.equal(partners(*found[:2]), partners(dropped, match))
            assert torch.equal(found[2] if in_order else found[2].sort(1).values, kept)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("ranks", [2, TOKENS])
def test_nearest(similarity, ranks):
    rank = torch.randint(ranks, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    check(own.nearest_token.default, X, rank, 2, similarity)


@pytest.mark.parametrize("keep", [1, 9, TOKENS - 2])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_peaks(keep, exponent):
    op, importance = own.peaks_match.default, SCORES.abs()
    score, kept, dropped, match = op(X, importance, keep, 2, exponent)
    for formulation, in_order in ((IN_ORDER[op], True), (FREE[op], False)):
        found = formulation(X, importance, keep, 2, exponent)
        torch.testing.assert_close(found[0], score)
        assert torch.equal(found[1] if in_order else found[1].sort(1).values, kept)
        assert torch.equal(partners(*found[2:]), partners(dropped, match))


@pytest.mark.parametrize("partition", ["unimportant", "important"])
@pytest.mark.parametrize(("num_prefix", "class_start"), [(0, False), (2, True)])
def test_zero_tprune(num_prefix, class_start, partition):
    op = own.zero_tprune.default
    args = (*QK, QK[1], 0.3, 5, class_start, 4, 0.0, 0.0, 100.0, num_prefix, partition)
    scores, dropped, match = op(*args)
    for formulation in (IN_ORDER[op], FREE[op]):
        found = formulation(*args)
        torch.testing.assert_close(found[0], scores)
        assert torch.equal(partners(*found[1:]), partners(dropped, match))


@pytest.mark.parametrize("size", [None, SIZE])
def test_merging(size):
    _, kept, dropped, match = own.peaks_match(X, SCORES.abs(), 9, 2)
    match[:, 0] = dropped[:, 0]  # goes nowhere
    check(own.merge_tokens.default, X, size, kept, dropped, match, 2)


def test_torch_operators():
    check(aten.sort.stable, SCORES, stable=True, dim=1)
    check(aten.scatter.value, SCORES, 1, torch.tensor([[0, 3, 3]] * BATCH), 7.0)
    positions = torch.tensor([[9, 2, 5]] * BATCH)
    check(aten.scatter.src, SCORES * torch.inf, 1, positions, random(BATCH, 3))
    assert IN_ORDER[aten.scatter.src](positions, 1, positions % 3, positions) is NotImplemented
    check(aten.cumsum.default, torch.tensor([[1, 0, 3, 1]]), 1)
    positions = torch.tensor([[5, 2, 9]])
    assert IN_ORDER[aten.sort.default](positions, 1)[0].tolist() == [[2, 5, 9]]
    assert FREE[aten.sort.default](positions, 1)[0].tolist() == [[5, 2, 9]]
    q, k, v = *QK, QK[1]
    mask = random(BATCH, 1, 1, TOKENS)
    check(aten.scaled_dot_product_attention.default, q, k, v, mask, scale=0.3)
    check(aten.scaled_dot_product_attention.default, q, k, v)
    left_to_torch = IN_ORDER[aten.scaled_dot_product_attention.default](q, k, v, mask > 0)
    assert left_to_torch is NotImplemented
