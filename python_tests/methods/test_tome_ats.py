"""ToMe and ATS against slow float64 implementations."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.contexts import KINDS, check_reduced, check_scores, context
from methods.slow_methods import ats, tome
from methods.slow_scores import ats_scores

from tokenprune_ext import methods

GEOMETRIES = [(12, 1), (11, 1), (11, 0), (12, 5)]  # patch and prefix tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), GEOMETRIES)
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("reduction", ["merge", "drop"])
def test_tome(kind, patches, prefix, sizes, reduction):
    method = methods.create("tome", reduction=reduction)
    ctx = context(kind, patches, prefix, sizes=sizes)
    for r in (1, 3, patches // 2):
        check_reduced(method, ctx, patches - r, lambda image: tome(image, patches - r, reduction == "merge"))  # noqa: B023


def test_tome_says_whether_attention_is_proportional():
    assert methods.create("tome").reduce(context(), 7).bias
    assert not methods.create("tome", proportional=False).reduce(context(), 7).bias
    assert methods.create("tome", reduction="drop").reduce(context(), 7).size is None


def test_tome_counts_of_r():
    method = methods.create("tome")
    assert method.keep_from_r(8, 12, 196) == [196 - 8 * layer for layer in range(1, 13)]
    assert method.keep_from_r([10, 0, 3], 3, 49) == [39, 39, 36]
    assert method.keep_from_r(0, 2, 49) == [49, 49]
    assert method.keep_from_r(2.5, 4, 49) == [47, 44, 42, 39]


def test_tome_removes_at_most_half():
    method = methods.create("tome")
    assert method.keep_from_r(100, 4, 49) == [25, 13, 7, 4]
    assert method.keep_from_r([10, 3], 2, 16) == [8, 5]  # what did not fit is not made up for
    assert method.keep_from_r([3, 1, 1], 3, 5) == [3, 2, 1]
    assert method.keep_from_r([32 - 1.5e-9, 1e9], 2, 64) == [33, 17]  # not below the half of 33, for rounding
    assert [method.min_keep(n) for n in (1, 2, 5, 6)] == [1, 1, 3, 3]


def test_tome_inflection_is_a_linear_ramp():
    rising = methods.create("tome", inflection=1.0).keep_from_r(10, 5, 196)
    assert [a - b for a, b in zip([196, *rising], rising, strict=False)] == [0, 5, 10, 15, 20]
    falling = methods.create("tome", inflection=-1.0).keep_from_r(10, 5, 196)
    assert [a - b for a, b in zip([196, *falling], falling, strict=False)] == [20, 15, 10, 5, 0]
    assert methods.create("tome", inflection=0.5).keep_from_r(10, 1, 196) == [186]  # the average


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 40), st.floats(-1, 1), st.integers(2, 24), st.integers(1, 400))
def test_tome_ramp_against_a_loop(r, inflection, layers, patches):
    """Layer by layer with exact fractions: r (1 + inflection (2 i / (L - 1) - 1)), at most half; counts round up."""
    left = float(patches)
    wanted = []
    for i in range(layers):
        left = max(left - r * (1 + inflection * (2 * i / (layers - 1) - 1)), left / 2)
        wanted.append(left)
    counts = methods.create("tome", inflection=inflection).keep_from_r(r, layers, patches)
    assert all(
        math.ceil(exact - 1e-6) <= count <= math.ceil(exact) for count, exact in zip(counts, wanted, strict=True)
    )


@pytest.mark.parametrize("r", [-1, [3, -1], [3], [1, 2, 3]])
def test_tome_refuses_a_bad_r(r):
    with pytest.raises(ValueError, match="r must be one number from 0 on, or 2 of them, got"):
        methods.create("tome").keep_from_r(r, 2, 49)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "prefix"), [(11, 1), (11, 2), (13, 5)])
def test_ats(kind, patches, prefix):
    ctx = context(kind, patches, prefix)
    check_scores(methods.create("ats"), ctx, ats_scores)
    for quantiles in (1, 5, patches - 1):
        check_reduced(methods.create("ats"), ctx, quantiles, lambda image: ats(image, quantiles))  # noqa: B023


def test_ats_with_padding_among_what_comes_in():
    """Nothing attends to it and it is never sampled again."""
    ctx = context(patches=11)
    size = torch.ones(2, 12, dtype=torch.float64)
    size[0, [2, 7, 11]] = 0
    padded = dataclasses.replace(ctx, size=size, bias=size.log()[:, None, None, :])
    method = methods.create("ats")
    assert padded.class_attention()[0, :, [2, 7, 11]].eq(0).all()
    for quantiles in (3, 8, 10):
        check_reduced(method, padded, quantiles, lambda image: ats(image, quantiles))  # noqa: B023
        reduced = method.reduce(padded, quantiles)
        sampled = reduced.kept[0][reduced.size[0, 1:] > 0]
        assert not set(sampled.tolist()) & {2, 7, 11}


def test_ats_keeps_fewer_where_attention_is_concentrated():
    kept = {
        kind: methods.create("ats").reduce(context(kind, patches=12), 8).size[:, 1:].sum(1).tolist()
        for kind in ("constant", "dominant")
    }
    assert kept == {"constant": [8.0, 8.0], "dominant": [1.0, 1.0]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ats_when_no_patch_has_any_attention(dtype):
    """In low precision all scores can underflow; what is sampled then does not matter, but something is."""
    exact = context("dominant", patches=12)
    k = exact.k.clone()
    k[:, :, 0], k[:, :, 5] = 12 * k[:, :, 5], 0.0
    ctx = dataclasses.replace(exact, x=exact.x.to(dtype), q=exact.q.to(dtype), k=k.to(dtype), v=exact.v.to(dtype))
    assert methods.create("ats").scores(ctx)[:, 1:].eq(0).all()
    reduced = methods.create("ats").reduce(ctx, 5)
    assert reduced.size.isfinite().all()
    assert (reduced.size[:, 1:].sum(1) >= 1).all()
