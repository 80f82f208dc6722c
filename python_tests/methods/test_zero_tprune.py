"""Zero-TPrune's I' -> S -> I against a slow float64 implementation."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from methods.contexts import KINDS, check_reduced, check_scores, context
from methods.slow_methods import importance, zero_tprune
from methods.slow_scores import Image, attention, page_rank

from tokenprune_ext import methods, ops
from tokenprune_ext.methods import ZeroTPrune, zero_tprune_stages
from tokenprune_ext.methods.random import random_scores

GEOMETRIES = [(12, 1), (11, 1), (11, 0), (12, 5)]  # patch and prefix tokens
BOUNDS = {"vmin": 0.02, "vmax": 0.3}  # on these inputs some heads pass and some do not


def check(ctx, keep, iterations=5, *, reduction="drop", **options):
    """One layer against the slow one, with the same options."""
    ranking = {"start": "class" if ctx.has_class_token else "uniform", "tol": 0.0, **BOUNDS}
    ranking |= {name: options.pop(name) for name in ("start", "tau", "tol", "vmin", "vmax") if name in options}
    method = methods.create("zero_tprune", iters=(iterations,) * 3, reduction=reduction, **ranking, **options)
    random = None
    if options.get("partition") == "random":
        values = random_scores(ctx, seed=0)[0]
        random = {token: float(values[token]) for token in range(ctx.num_prefix, ctx.x.shape[1])}

    def slow(image: Image):
        return zero_tprune(image, keep, iterations, merges=reduction == "merge", random=random, **options, **ranking)

    check_reduced(method, ctx, keep, slow)


@pytest.mark.parametrize(
    ("prefix", "start"), [(0, "uniform"), (1, "class"), (1, "uniform"), (2, "class"), (5, "class")]
)
@pytest.mark.parametrize(("layer", "iterations"), [(0, 30), (2, 30), (3, 5), (8, 5), (9, 1), (11, 1)])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_importance(prefix, start, layer, iterations, tau):
    ctx = context(prefix=prefix, layer=layer, spread=1.0)
    method = ZeroTPrune(start=start, tau=tau, tol=0.0, **BOUNDS)
    options = {"start": start, "tau": tau, **BOUNDS}
    check_scores(method, ctx, lambda image: importance(image, list(image.patches), iterations, **options))


def test_the_head_filter_takes_part():
    """The case above filters some heads out and leaves some in; otherwise it would not test the filter."""
    passing = set()
    for layer, iterations in ((0, 30), (3, 5), (9, 1)):
        ctx = context(layer=layer, spread=1.0)
        start = [len(ctx.x[0]) ** 0.5] + [1.0] * (len(ctx.x[0]) - 1)
        for number in range(2):
            image = Image.of(ctx, number)
            ranks = torch.tensor([page_rank(attention(image, head), start, iterations) for head in image.heads])
            variance = ranks[:, 1:].var(1, correction=0)
            passing.add(int(((variance >= BOUNDS["vmin"]) & (variance <= BOUNDS["vmax"])).sum()))
    assert passing & {1, 2}


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_start_chooses_itself(prefix):
    with_class, without = context(prefix=prefix), context(prefix=prefix, class_token=False)
    auto = ZeroTPrune()
    assert torch.equal(auto.scores(with_class), ZeroTPrune(start="class" if prefix else "uniform").scores(with_class))
    assert torch.equal(auto.scores(without), ZeroTPrune(start="uniform").scores(without))


def test_tolerance_stops_early():
    ctx = context()
    one = ZeroTPrune(iters=(1, 1, 1), tol=0.0).scores(ctx)
    assert torch.equal(ZeroTPrune(tol=1e6).scores(ctx), one)
    assert not torch.equal(ZeroTPrune(tol=0.0).scores(ctx), one)
    for tol in (0.02, 0.1):
        check_scores(
            ZeroTPrune(tol=tol, start="class"),
            ctx,
            lambda image: importance(image, list(image.patches), 5, tol=tol, start="class"),  # noqa: B023
        )


@pytest.mark.parametrize("partition", ["unimportant", "important", "alternate", "random"])
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_partitions(partition, patches, prefix, reduction):
    for keep, similar in ((5, None), (5, 3), (8, 2), (5, 0), (1, None), (patches - 1, None)):
        check(context(patches=patches, prefix=prefix), keep, partition=partition, similar=similar, reduction=reduction)


@pytest.mark.parametrize("feature", ["key", "key_heads", "query", "value", "hidden"])
@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_features(feature, reduction):
    check(context(patches=11, prefix=2), 6, feature=feature, reduction=reduction)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("feature", ["key", "hidden"])
@pytest.mark.parametrize("partition", ["unimportant", "alternate"])
@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_metrics(metric, feature, partition, reduction):
    ctx = context(patches=12, prefix=1)
    check(ctx, 5, feature=feature, similar=4, partition=partition, metric=metric, reduction=reduction)


def test_metrics_choose_differently():
    """On these inputs; otherwise the case above would not test the option."""
    ctx = context(patches=12, prefix=1)
    removed = {
        str(zero_tprune_stages.similar_tokens(ctx, ctx.k, None, 4, "alternate", metric)[0].tolist())
        for metric in zero_tprune_stages.METRICS
    }
    assert len(removed) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_adversarial_inputs(kind, patches, prefix, reduction):
    for similar in (0, 3):
        check(context(kind, patches, prefix), 5, similar=similar, reduction=reduction)


@pytest.mark.parametrize("start", ["class", "uniform"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("iterations", [1, 30])
@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_ranking_options(start, tau, iterations, reduction):
    ctx = context(patches=11, prefix=1, sizes=reduction == "merge")
    check(ctx, 5, iterations, start=start, tau=tau, similar=3, reduction=reduction)


def test_sizes_weigh_in():
    """Merged tokens are ranked and averaged as what they stand for."""
    ctx = context(patches=11, sizes=True)
    check(ctx, 5, reduction="merge", similar=4)
    alone = dataclasses.replace(ctx, size=None, bias=None)
    method = methods.create("zero_tprune", reduction="merge")
    assert not torch.equal(method.scores(ctx), method.scores(alone))


def test_a_partner_that_is_lost_takes_along_what_went_into_it():
    """The case occurs, and no patch is without a token then."""
    ctx = context(patches=12)
    method = methods.create("zero_tprune", reduction="merge", similar=6)
    reduced = method.reduce(ctx, 2)
    rough = method.scores(ctx, iters=1)
    dropped, match, _ = zero_tprune_stages.similar_tokens(ctx, ctx.k, rough, 6, method.partition, method.metric)
    kept = [set(row) for row in reduced.kept.tolist()]
    assert any(partner not in kept[image] for image, row in enumerate(match.tolist()) for partner in row)
    into = reduced.into()
    assert all(int(into[image, token]) in kept[image] for image, row in enumerate(dropped.tolist()) for token in row)
    assert reduced.size.sum(1).tolist() == [13.0, 13.0]


def test_default_similar_is_ten_or_what_the_layer_removes():
    assert _removed(30, 10) == 10
    assert _removed(30, 25) == 5
    assert _removed(30, 10, similar=12) == 12
    assert _removed(8, 1) == 4


def _removed(patches, keep, **options):
    """Pairs the similarity stage is asked for."""
    with mock.patch.object(ops, "zero_tprune", wraps=ops.zero_tprune) as watched:
        methods.create("zero_tprune", **options).reduce(context(patches=patches), keep)
    return watched.call_args.args[4]


def test_iterations_at_other_depths():
    method = methods.create("zero_tprune", iters=(7, 3, 2))
    assert [method.iterations(layer, 4) for layer in range(4)] == [7, 3, 3, 2]
    assert [method.iterations(layer, 24) for layer in (0, 5, 6, 17, 18, 23)] == [7, 7, 3, 3, 2, 2]
    assert [method.iterations(layer, 2) for layer in range(2)] == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_importance_stays_close(dtype):
    exact = context(spread=1.0, sizes=True)
    low = {part: getattr(exact, part).to(dtype) for part in ("x", "q", "k", "v", "bias")}
    scores = ZeroTPrune().scores(dataclasses.replace(exact, **low))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 1:].double(), ZeroTPrune().scores(exact)[:, 1:], rtol=0.05, atol=0.02)
