"""Methods of one score a token against slow float64 loops: the scores, and what becomes of the other tokens."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from methods.contexts import KINDS, check_reduced, check_scores, context
from methods.slow_methods import Pruned, reduce_tokens
from methods.slow_scores import Image, peaks_scores, pomt_scores, topk_scores

from tokenprune_ext import methods

GEOMETRIES = [(10, 1), (9, 1), (9, 0), (10, 2), (9, 5)]  # patch and prefix tokens
REDUCTIONS = ("drop", "mean", "weighted", "sum", "merge")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("sizes", [False, True])
def test_topk_scores(kind, patches, prefix, sizes):
    check_scores(methods.create("topk"), context(kind, patches, prefix, sizes=sizes), topk_scores)


def test_topk_without_class_token_but_with_registers():
    check_scores(methods.create("topk"), context(prefix=4, class_token=False), topk_scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
def test_pomt_scores(kind, patches, prefix):
    ctx = context(kind, patches, prefix)
    for feature, how in itertools.product(("v", "k", "q"), ("max", "mean", "sum")):
        method = methods.create("pomt", feature=feature, head_reduce=how)
        check_scores(method, ctx, lambda image: pomt_scores(image, feature, how))  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("sizes", [False, True])
def test_peaks_scores(kind, patches, prefix, sizes):
    ctx = context(kind, patches, prefix, sizes=sizes)
    sources = ("class", "received", "wpr", "norm") if prefix else ("received", "wpr", "norm")
    for source, (exponent, value_length) in itertools.product(sources, ((0.5, False), (1.0, True))):
        method = methods.create("peaks", importance=source, exponent=exponent, value_length=value_length)
        check_scores(method, ctx, lambda image: peaks_scores(image, source, exponent, value_length))  # noqa: B023


@pytest.mark.parametrize(("class_token", "source"), [(True, "class"), (False, "received")])
def test_peaks_chooses_its_importance(class_token, source):
    ctx = context(prefix=2, class_token=class_token)
    chosen = methods.create("peaks", importance=source).scores(ctx)
    assert torch.equal(methods.create("peaks").scores(ctx), chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [False, True])
def test_reductions(reduction, kind, patches, prefix, sizes):
    """What is kept, fused and merged, for a score that says nothing about the tokens, and for one that does."""
    ctx = context(kind, patches, prefix, sizes=sizes)
    for keep in (2, 5, patches - 1):
        for name, scores in (("pomt", pomt_scores), ("topk", topk_scores), ("evit", topk_scores)):
            method = methods.create(name, reduction=reduction)
            check_reduced(method, ctx, keep, lambda image: reduce_tokens(image, scores(image), keep, reduction))  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("sizes", [False, True])
def test_peaks(kind, patches, prefix, sizes):
    ctx = context(kind, patches, prefix, sizes=sizes)

    def slow(image: Image) -> Pruned:
        scores = peaks_scores(image, "class" if prefix else "received")
        return reduce_tokens(image, scores, keep, "merge")

    for keep in (1, 4, patches - 1):
        check_reduced(methods.create("peaks"), ctx, keep, slow)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_random(reduction):
    """Any scores will do that are the same for every image; they are float32."""
    ctx = context(patches=9, prefix=2)
    method = methods.create("random", seed=5, reduction=reduction)
    scores = {token: float(method.scores(ctx)[0, token]) for token in range(2, 11)}
    check_reduced(method, ctx, 4, lambda image: reduce_tokens(image, scores, 4, reduction), rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["topk", "evit", "pomt", "random", "peaks"])
def test_defaults(name, reduction):
    """The published reduction of every method, and that any other goes with it."""
    published = {"evit": "sum", "pomt": "mean", "peaks": "merge"}
    assert methods.create(name).reduction == published.get(name, "drop")
    method = methods.create(name, reduction=reduction)
    reduced = method.reduce(context(), 4)
    assert reduced.x.shape[1] == 5
    assert reduced.fused == (reduction in ("mean", "weighted", "sum"))
    assert (reduced.size is not None) == method.carries_size == (reduction == "merge")
    assert reduced.bias == (reduction == "merge")
    assert method.min_keep(9) == (2 if reduced.fused else 1)
    if reduction == "merge":
        assert not methods.create(name, reduction=reduction, proportional=False).reduce(context(), 4).bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strength", [1, 12])
def test_one_dominant_token_in_low_precision(reduction, dtype, strength):
    """All attention goes to one token: the others' scores are tiny or 0, and still a finite token stands for them."""
    exact = context("dominant", prefix=1)
    ctx = dataclasses.replace(exact, **{name: getattr(exact, name).to(dtype) for name in ("x", "q", "k", "v")})
    ctx = dataclasses.replace(ctx, k=ctx.k * strength)
    method = methods.create("evit", reduction=reduction)
    assert (method.scores(ctx)[:, 1:].eq(0).sum(1) == (0 if strength == 1 else 9)).all()
    reduced = method.reduce(ctx, 4)
    assert reduced.x.isfinite().all()
    if reduction == "weighted":  # a mean lies among what it is a mean of
        assert (reduced.x[:, -1] <= ctx.x[:, 1:].amax(1)).all()
        assert (reduced.x[:, -1] >= ctx.x[:, 1:].amin(1)).all()
        assert (reduced.x[:, -1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["pomt", "random", "topk", "evit", "peaks"])
def test_low_precision_scores_stay_close(name, dtype):
    exact = context(spread=1.0, sizes=True)
    low = {part: getattr(exact, part).to(dtype) for part in ("x", "q", "k", "v", "bias")}
    method = methods.create(name)
    scores = method.scores(dataclasses.replace(exact, **low))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 1:].double(), method.scores(exact)[:, 1:].double(), rtol=0.05, atol=0.02)
