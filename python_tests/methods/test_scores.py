"""Scores against independent float64 implementations written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from tokenprune_ext import methods
from tokenprune_ext.patch import AttentionContext


def context(prefix=1, class_token=True, layer=0, depth=12, batch=2, heads=3, tokens=11, dim=4, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (spread * torch.randn(batch, heads, tokens, dim, generator=generator).double() for _ in range(3))
    return AttentionContext(q, k, v, dim**-0.5, prefix, class_token, layer, depth)


def softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def attention_rows(ctx, image, head, tau=1.0):
    """Attention matrix of one head as lists."""
    q, k = ctx.q[image, head].tolist(), ctx.k[image, head].tolist()
    return [softmax([ctx.scale / tau * sum(a * b for a, b in zip(qi, kj, strict=True)) for kj in k]) for qi in q]


REDUCTIONS = {"max": max, "mean": lambda values: sum(values) / len(values), "sum": sum}


def pomt_scores(ctx, image, feature, head_reduce):
    """algorithms: sum over patch queries of the head-reduced attention, scaled by its maximum, plus the value term."""
    reduce = REDUCTIONS[head_reduce]
    heads, tokens = range(ctx.q.shape[1]), range(ctx.q.shape[2])
    patches = tokens[ctx.num_prefix :]
    attention = [attention_rows(ctx, image, head) for head in heads]
    received = [sum(reduce([attention[head][row][column] for head in heads]) for row in patches) for column in patches]
    vectors = getattr(ctx, feature)[image].tolist()
    channels = range(ctx.q.shape[3])
    sums = [sum(reduce([vectors[head][token][channel] for head in heads]) for channel in channels) for token in tokens]
    weights = softmax(sums)[ctx.num_prefix :]
    return [value / max(received) + weight for value, weight in zip(received, weights, strict=True)]


def zero_tprune_scores(ctx, image, start, iterations, tau, vmin, vmax):
    """Page rank by s_j <- sum_i A_ij s_i per head, head filter, root mean square."""
    tokens = ctx.q.shape[2]
    patches = range(ctx.num_prefix, tokens)
    per_head = []
    for head in range(ctx.q.shape[1]):
        attention = attention_rows(ctx, image, head, tau)
        scores = [1.0] * tokens
        if start == "class":
            scores[0] = math.sqrt(tokens)
        for _ in range(iterations):
            scores = [sum(attention[i][j] * scores[i] for i in range(tokens)) for j in range(tokens)]
        per_head.append([scores[token] for token in patches])
    passing = []
    for scores in per_head:
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        if vmin <= variance <= vmax:
            passing.append(scores)
    passing = passing or per_head
    combined = [math.sqrt(sum(s[i] ** 2 for s in passing) / len(passing)) for i in range(len(patches))]
    return combined, len(passing)


def check(method, ctx, expected):
    scores = method.scores(ctx)
    assert scores.shape == (ctx.q.shape[0], ctx.q.shape[2])
    wanted = torch.tensor([expected(image) for image in range(ctx.q.shape[0])], dtype=torch.float64)
    torch.testing.assert_close(scores[:, ctx.num_prefix :].double(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("feature", ["v", "k", "q"])
@pytest.mark.parametrize("head_reduce", ["max", "mean", "sum"])
def test_pomt(prefix, feature, head_reduce):
    ctx = context(prefix, prefix > 0)
    method = methods.create("pomt", feature=feature, head_reduce=head_reduce)
    check(method, ctx, lambda image: pomt_scores(ctx, image, feature, head_reduce))


@pytest.mark.parametrize(
    ("prefix", "start"), [(0, "uniform"), (1, "class"), (1, "uniform"), (2, "class"), (5, "class")]
)
@pytest.mark.parametrize(("layer", "iterations"), [(0, 30), (2, 30), (3, 5), (8, 5), (9, 1), (11, 1)])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_zero_tprune(prefix, start, layer, iterations, tau):
    ctx = context(prefix, prefix > 0, layer=layer, spread=1.0)
    method = methods.create("zero_tprune", start=start, tau=tau, tol=0.0, vmin=0.02, vmax=0.3)
    check(method, ctx, lambda image: zero_tprune_scores(ctx, image, start, iterations, tau, 0.02, 0.3)[0])


def test_zero_tprune_head_filter_takes_part():
    """The case above filters some heads out and leaves some in; otherwise it would not test the filter."""
    passing = {
        zero_tprune_scores(context(1, layer=layer, spread=1.0), image, "class", iterations, 1.0, 0.02, 0.3)[1]
        for layer, iterations in ((0, 30), (3, 5), (9, 1))
        for image in range(2)
    }
    assert passing & {1, 2}


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_zero_tprune_auto_start(prefix):
    with_class, without = context(prefix, prefix > 0), context(prefix, False)
    auto = methods.create("zero_tprune")
    wanted = methods.create("zero_tprune", start="class" if prefix else "uniform")
    assert torch.equal(auto.scores(with_class), wanted.scores(with_class))
    assert torch.equal(auto.scores(without), methods.create("zero_tprune", start="uniform").scores(without))


def test_zero_tprune_tolerance_stops_early():
    ctx = context()
    one = methods.create("zero_tprune", iters=(1, 1, 1), tol=0.0).scores(ctx)
    assert torch.equal(methods.create("zero_tprune", tol=1e6).scores(ctx), one)
    assert not torch.equal(methods.create("zero_tprune", tol=0.0).scores(ctx), one)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_topk_with_class_token(prefix):
    ctx = context(prefix)

    def expected(image):
        rows = [attention_rows(ctx, image, head)[0] for head in range(3)]
        return [sum(row[token] for row in rows) / 3 for token in range(prefix, 11)]

    check(methods.create("topk"), ctx, expected)


@pytest.mark.parametrize("prefix", [0, 4])
def test_topk_without_class_token(prefix):
    ctx = context(prefix, class_token=False)

    def expected(image):
        heads = [attention_rows(ctx, image, head) for head in range(3)]
        return [sum(row[token] for rows in heads for row in rows) / 3 for token in range(prefix, 11)]

    check(methods.create("topk"), ctx, expected)


def test_class_attention():
    ctx = context(dim=8)
    torch.testing.assert_close(ctx.class_attention()[1, 2], torch.tensor(attention_rows(ctx, 1, 2)[0]).double())
    with pytest.raises(ValueError, match="needs a class token"):
        context(class_token=False).class_attention()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["pomt", "random", "topk", "zero_tprune"])
def test_low_precision_scores_stay_close(name, dtype):
    exact = context(spread=1.0)
    q, k, v = (part.to(dtype) for part in (exact.q, exact.k, exact.v))
    method = methods.create(name)
    scores = method.scores(AttentionContext(q, k, v, exact.scale, 1, True, 0, 12))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 1:].double(), method.scores(exact)[:, 1:].double(), rtol=0.05, atol=0.01)
