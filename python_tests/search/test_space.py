"""Schedules along a direction: within the budget, as mild as it allows, and refused by name."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
from host_models import make_host
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from tokenprune_ext import Schedule, methods
from tokenprune_ext.macs import MacsShare
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.search.space import Space

weights = st.one_of(st.floats(-0.5, 1.0), st.just(0.0), st.just(1.0))


@functools.cache
def deep(name: str):
    """A model of 12 blocks and 49 patches, its space for a method, and what schedules cost."""
    model = make_host("vit", depth=12, img_size=112)
    return model, Space.of(model, methods.create(name)), MacsShare(model)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["topk", "tome", "evit", "zero_tprune"]), st.lists(weights, min_size=11, max_size=11), st.data())
@example("tome", [0.0] * 10 + [1.0], None)
@example("topk", [0.0, 0.01, *[0.0] * 9], None)
def test_a_schedule_meets_its_budget_and_no_milder_one_does(name, direction, data):
    _, space, cost = deep(name)
    budget = 0.7 if data is None else data.draw(st.floats(0.3, 1.0))
    found = space.schedule(dict(enumerate(direction)), space.method, budget, cost)
    pruning = [layer for layer, weight in enumerate(direction) if weight > 0]
    if found is None:  # then not even the strongest one does
        strongest, entering = {}, 49
        for layer in pruning:
            strongest[layer] = entering = min(entering, max(space.method.min_keep(entering), 1))
        assert not pruning or cost(strongest, space.method) > budget
        return
    assert cost(found.keep, space.method) <= budget
    assert set(found.keep) <= set(pruning)
    counts = [49, *found.keep.values()]
    assert all(later < earlier for earlier, later in pairwise(counts))  # every layer prunes
    if len(pruning) == 1:  # one token more is beyond the budget
        (layer,) = pruning
        milder = found.keep.get(layer, 49) + 1
        assert milder > 49 or cost({layer: milder}, space.method) > budget or not found.keep
    halved = {layer: weight / 2 for layer, weight in enumerate(direction)}
    assert space.plan(halved, space.method, budget, cost) == found.keep  # only proportions count


@pytest.mark.parametrize("name", ["topk", "zero_tprune", "evit", "peaks"])
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_a_uniform_direction_is_the_plan_of_apply(name, budget):
    model, space, cost = deep(name)
    for label, direction in space.uniform().items():
        found = space.schedule(direction, space.method, budget, cost)
        if found is not None:
            assert found == Schedule.build(model, space.method, layers=list(direction), macs=budget)
            assert label == "uniform at " + ", ".join(map(str, direction))


def test_uniform_schedules_begin_with_the_methods_own():
    _, space, _ = deep("zero_tprune")
    assert next(iter(space.uniform())) == "uniform at 2, 5, 8"
    assert "uniform at 3, 5, 7, 9" in space.uniform()
    assert len(space.uniform()) == 5
    model = deep("topk")[0]
    assert list(Space.of(model, methods.create("topk"), [1, 3]).uniform()) == ["uniform at 3"]


def test_papers_leave_scoring_out():
    model, space, charged = deep("zero_tprune")
    blocks = MacsShare(model, scoring=False)
    direction = {2: 1.0, 5: 1.0, 8: 1.0}
    kept = space.plan(direction, space.method, 0.6, blocks)
    assert blocks(kept, space.method) <= 0.6 < charged(kept, space.method)


def test_every_block_but_the_last_may_prune():
    assert deep("topk")[1].layers == tuple(range(11))
    auto = Space.of(make_host("vit"), methods.create("auto"))
    assert auto.method.name == "peaks"
    assert auto.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"method": methods.create("dense")}, ValueError, "dense prunes nothing: there is nothing to search"),
        ({"layers": [4]}, ValueError, r"layers has 4, but the model has layers 0..3"),
        ({"layers": []}, ValueError, "layers must name at least one block"),
        ({"method": methods.create("topk", class_token_only=True), "layers": [3]}, ValueError, "class token alone"),
        ({"tune": {"reduction": ["drop"]}}, ValueError, "tune has 1 value for reduction: give at least two"),
        ({"tune": {"reduction": ["drop", "fuse"]}}, ValueError, "reduction must be one of drop, mean"),
        ({"tune": {"rate": [1, 2]}}, ValueError, "method 'topk' has no option rate"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Space.of(make_host("vit"), **{"method": methods.create("topk"), **arguments})


def test_a_method_that_does_not_suit_the_model_is_refused():
    with pytest.raises(ValueError, match="ats scores by the class token"):
        Space.of(make_host("siglip"), methods.create("ats"))
    with pytest.raises(UnsupportedModelError):
        Space.of(nn.Linear(2, 2), methods.create("topk"))
