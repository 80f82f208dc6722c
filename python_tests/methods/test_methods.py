"""The rules every method keeps, the registry and the options."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from host_models import PRUNING, images_for, make_host
from hypothesis import example, given, settings
from hypothesis import strategies as st
from methods.contexts import context

from tokenprune_ext import methods
from tokenprune_ext.macs import block_costs, blocks_macs
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.prune import apply, describe, schedule_of, trace

NAMES = ("ats", "auto", "dense", "evit", "peaks", "pomt", "random", "tome", "topk", "zero_tprune")
SCORED = ("evit", "peaks", "pomt", "random", "topk")
NEED_CLASS_TOKEN = ("ats", "auto")  # auto: of these contexts, whose method nobody has resolved


def of_image(ctx, image):
    """The context of one image alone."""
    parts = {part: getattr(ctx, part)[image : image + 1] for part in ("x", "q", "k", "v", "size", "bias")}
    return dataclasses.replace(ctx, **parts)


def permuted(ctx, tokens):
    """The context with its tokens in another order."""
    q, k, v = (part[:, :, tokens] for part in (ctx.q, ctx.k, ctx.v))
    size, bias = ctx.size[:, tokens], ctx.bias[..., tokens]
    return dataclasses.replace(ctx, x=ctx.x[:, tokens], q=q, k=k, v=v, size=size, bias=bias)


def test_available():
    assert methods.available() == NAMES
    assert [methods.create(name).name for name in NAMES] == list(NAMES)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PRUNING), st.integers(1, 5), st.integers(2, 14), st.data())
def test_reduction(name, prefix, patches, data):
    """Prefix in front and unchanged, kept tokens in their order, as many as were asked for, mass conserved."""
    method = methods.create(name)
    keep = data.draw(st.integers(min(patches - 1, max(1, method.min_keep(patches))), patches - 1))
    if keep < method.min_keep(patches):
        return
    ctx = context(patches=patches, prefix=prefix, seed=data.draw(st.integers(0, 99)), sizes=method.carries_size)
    reduced = method.reduce(ctx, keep)
    assert reduced.x.shape == (2, prefix + keep, ctx.x.shape[2])
    assert reduced.kept.shape == (2, keep - reduced.fused)
    assert (reduced.kept.diff(dim=1) > 0).all()
    assert (reduced.kept >= prefix).all()
    assert torch.equal(reduced.x[:, :prefix], ctx.x[:, :prefix])
    assert (reduced.size is not None) == method.carries_size
    if name == "ats":
        assert set(reduced.size.unique().tolist()) <= {0.0, 1.0}
    elif reduced.size is not None:
        torch.testing.assert_close(reduced.size.sum(1), ctx.size.sum(1))
    else:
        kept = ctx.x.gather(1, reduced.kept.unsqueeze(-1).expand(-1, -1, ctx.x.shape[2]))
        assert torch.equal(reduced.x[:, prefix : prefix + kept.shape[1]], kept)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PRUNING), st.integers(1, 5), st.integers(0, 99))
def test_an_image_does_not_depend_on_the_batch(name, prefix, seed):
    method = methods.create(name)
    ctx = context(batch=3, patches=11, prefix=prefix, seed=seed, sizes=True)
    together = method.reduce(ctx, 7)
    for image in range(3):
        alone = method.reduce(of_image(ctx, image), 7)
        assert torch.equal(alone.kept[0], together.kept[image])
        torch.testing.assert_close(alone.x[0], together.x[image], rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["evit", "peaks", "pomt", "topk"]), st.integers(0, 4), st.permutations(range(8)))
def test_scores_follow_a_permutation_of_the_patches(name, prefix, order):
    method = methods.create(name)
    ctx = context(patches=8, prefix=prefix, sizes=True)
    tokens = torch.tensor([*range(prefix), *(prefix + patch for patch in order)])
    moved = method.scores(permuted(ctx, tokens))
    torch.testing.assert_close(moved[:, prefix:], method.scores(ctx)[:, tokens][:, prefix:])


def test_random_depends_on_seed_layer_and_position_only():
    first = methods.create("random", seed=3)
    scores = first.scores(context(batch=3, layer=2))
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores, first.scores(context(batch=3, layer=2, seed=9)))
    assert not torch.equal(scores, first.scores(context(batch=3, layer=3)))
    assert not torch.equal(scores, methods.create("random", seed=4).scores(context(batch=3, layer=2)))


def test_random_is_uniform():
    """Every token is kept about equally often, and pairs of tokens are independent."""
    tokens, seeds = 40, 4000
    ctx = context(batch=1, patches=tokens, prefix=0)
    scores = torch.cat([methods.create("random", seed=seed).scores(ctx) for seed in range(seeds)])
    kept = (scores.argsort(dim=1, descending=True).argsort(dim=1) < tokens // 2).double()
    deviation = (0.25 / seeds) ** 0.5
    assert (kept.mean(0) - 0.5).abs().max() < 5 * deviation
    pairs = kept.T @ kept / seeds
    expected = 0.5 * (tokens // 2 - 1) / (tokens - 1)
    pairs.fill_diagonal_(expected)
    assert (pairs - expected).abs().max() < 5.5 * deviation
    assert scores.min() >= 0
    assert scores.max() < 1


def test_random_keeps_the_same_patches_of_every_image():
    model = apply(make_host("vit"), methods.create("random", seed=1), layers=[1], keep=0.5)
    sources = trace(model, images_for(model, batch=3)).sources[1]
    assert torch.equal(sources[0], sources[1])
    assert torch.equal(sources[0], sources[2])


DEFAULT_LAYERS = {
    "ats": {12: tuple(range(3, 12)), 24: tuple(range(6, 24)), 4: (1, 2, 3), 1: (0,)},
    "dense": {12: (), 1: ()},
    "peaks": {12: (3, 4, 5, 6, 8), 24: (6, 8, 10, 12, 16), 40: (10, 13, 16, 20, 26), 4: (1, 2), 2: (0, 1), 1: (0,)},
    "pomt": {12: (3,), 40: (10,), 24: (6,), 4: (1,), 2: (0,), 1: (0,)},
    "random": {12: (3, 6, 9), 24: (6, 12, 18), 40: (10, 20, 30), 6: (1, 3, 4), 4: (1, 2, 3), 2: (0, 1), 1: (0,)},
    "tome": {12: tuple(range(12)), 1: (0,)},
    "zero_tprune": {12: (2, 5, 8), 24: (5, 11, 17), 40: (9, 19, 29), 4: (0, 1, 2), 2: (0,), 1: (0,)},
}
DEFAULT_LAYERS["topk"] = DEFAULT_LAYERS["evit"] = DEFAULT_LAYERS["random"]
DEFAULT_LAYERS["auto"] = DEFAULT_LAYERS["peaks"]


@pytest.mark.parametrize("name", NAMES)
def test_default_layers(name):
    method = methods.create(name)
    for depth, layers in DEFAULT_LAYERS[name].items():
        assert method.default_layers(depth) == layers
    for depth in range(1, 50):
        layers = method.default_layers(depth)
        assert layers == tuple(sorted(set(layers)))
        assert name == "dense" or 0 <= layers[0] <= layers[-1] < depth


def test_mid_block_zero_tprune_prunes_one_block_later():
    assert methods.create("zero_tprune", mid_block=True).default_layers(12) == (3, 6, 9)
    assert methods.create("zero_tprune", mid_block=True).where == "attention"
    assert methods.create("zero_tprune").where == "block"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 1000))
@example(patches=100, thousandths=290)  # 0.29 * 100 is 28.999999999999996 in floating point
def test_keep_count_is_the_floor_of_the_exact_product(patches, thousandths):
    assert methods.create("topk").keep_count(thousandths / 1000, patches) == thousandths * patches // 1000


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 1000))
def test_evit_keeps_the_ceiling_and_a_fused_token(patches, thousandths):
    wanted = min(patches, -(-thousandths * patches // 1000) + 1)
    assert methods.create("evit").keep_count(thousandths / 1000, patches) == wanted
    dropping = methods.create("evit", reduction="drop").keep_count(thousandths / 1000, patches)
    assert dropping == -(-thousandths * patches // 1000)


PLANNED = [*NAMES, "evit drop", "tome rising", "tome falling"]


def planned(name):
    name, *how = name.split()
    options = {"drop": {"reduction": "drop"}, "rising": {"inflection": 1.0}, "falling": {"inflection": -1}}
    return methods.create(name, **(options[how[0]] if how else {}))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PLANNED),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sets(st.integers(0, 11), min_size=1),
    st.integers(1, 300),
)
def test_a_stronger_plan_keeps_no_less_anywhere(name, first, second, layers, patches):
    method, layers = planned(name), sorted(layers)
    low, high = (method.plan(strength, layers, patches) for strength in sorted((first, second)))
    assert list(low) == list(high) == layers
    assert all(low[layer] <= high[layer] for layer in layers)
    for plan in (low, high):
        entering = patches
        for count in plan.values():
            assert min(entering, method.min_keep(entering)) <= count <= entering
            entering = count
    assert set(method.plan(1.0, layers, patches).values()) == {patches}


@pytest.mark.parametrize("name", [name for name in PRUNING if name != "auto"])
def test_a_budget_charges_scoring(name):
    """What is chosen fits with scoring added, and the next larger plan does not."""
    model = make_host("vit", depth=12, img_size=112)
    schedule = schedule_of(apply(model, name, macs=0.8))
    description = describe(model)
    assert description.scoring_macs > 0 or name == "random"
    spent = description.blocks_macs + description.scoring_macs
    assert spent <= 0.8 * description.dense_blocks_macs
    assert [layer.scoring_macs > 0 for layer in description.layers] == [
        name != "random" and schedule.keep.get(layer, 49) < schedule.entering().get(layer, 49) for layer in range(12)
    ]
    method, costs, host = schedule.build_method(), block_costs(model), inspect_host(model)
    larger = next(
        plan
        for step in range(10_001)
        for plan in [method.plan(step / 10_000, list(schedule.keep), 49)]
        if plan != schedule.keep and all(plan[layer] >= count for layer, count in schedule.keep.items())
    )
    assert sum(map(sum, blocks_macs(costs, host, larger, method))) > 0.8 * description.dense_blocks_macs


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        (methods.create("topk"), methods.create("topk", reduction="merge")),
        (methods.create("peaks", importance="norm"), methods.create("peaks", importance="class")),
        (methods.create("peaks", importance="class"), methods.create("peaks", importance="received")),
        (methods.create("peaks", importance="received"), methods.create("peaks", importance="wpr")),
        (methods.create("zero_tprune", similar=0), methods.create("zero_tprune", similar=8)),
        (methods.create("zero_tprune", feature="key"), methods.create("zero_tprune", feature="key_heads")),
        (methods.create("zero_tprune", partition="alternate"), methods.create("zero_tprune")),
        (methods.create("zero_tprune"), methods.create("zero_tprune", reduction="merge")),
        (methods.create("tome"), methods.create("pomt")),
    ],
    ids=repr,
)
def test_what_costs_more_is_charged_more(cheap, dear):
    model = make_host("vit", depth=12, img_size=112)
    cost, host = block_costs(model)[0], inspect_host(model)
    assert cheap.scoring_macs(cost, host, 3, 50, 25) < dear.scoring_macs(cost, host, 3, 50, 25)


def test_auto_becomes_peaks():
    """With the class-token-only last block where the classifier reads the class token alone."""
    for host, only in (("vit", True), ("deit_distilled", True), ("siglip", False), ("siglip_gap", False)):
        model = apply(make_host(host), methods.create("auto", importance="received", reduction="drop"), keep=0.7)
        method = schedule_of(model).build_method()
        assert method == methods.Peaks(importance="received", reduction="drop", class_token_only=only)
        assert schedule_of(model).method == describe(model).method == "peaks"


@pytest.mark.parametrize(
    "method",
    [
        methods.create("ats", class_token_only=True),
        methods.create("evit", reduction="weighted"),
        methods.create("peaks", importance="wpr", exponent=1.0, proportional=False),
        methods.create("pomt", feature="k", head_reduce="sum"),
        methods.create("random", seed=7),
        methods.create("tome", inflection=-0.5),
        methods.create("topk"),
        methods.create("zero_tprune", start="uniform", iters=(9, 8, 7), tol=0.0, tau=0.5, vmin=0.1, similar=3),
        methods.create("zero_tprune", partition="random", feature="hidden", mid_block=True, reduction="merge"),
    ],
    ids=repr,
)
def test_options_survive_json(method):
    options = json.loads(json.dumps(method.options()))
    assert methods.create(method.name, **options) == method
    assert hash(methods.create(method.name, **options)) == hash(method)


BAD_OPTIONS = [
    ("best", {}, ValueError, f"unknown method 'best'; available: {', '.join(methods.available(trained=True))}"),
    ("topk", {"rate": 1}, ValueError, "'topk' has no option rate; it has: class_token_only, reduction, proportional"),
    ("dense", {"reduction": "drop"}, ValueError, "method 'dense' has no option reduction; it has: class_token_only"),
    ("topk", {"class_token_only": 1}, TypeError, "class_token_only must be True or False, got 1"),
    (
        "topk",
        {"reduction": "fuse"},
        ValueError,
        "reduction must be one of drop, mean, weighted, sum, merge",
    ),
    ("topk", {"proportional": None}, TypeError, "proportional must be True or False, got None"),
    ("pomt", {"name": "x"}, ValueError, "method 'pomt' has no option name; it has: .*feature, head_reduce"),
    ("pomt", {"feature": "x"}, ValueError, "feature must be one of v, k, q, got 'x'"),
    ("pomt", {"head_reduce": "min"}, ValueError, "head_reduce must be one of max, mean, sum, got 'min'"),
    ("peaks", {"importance": "cls"}, ValueError, "importance must be one of auto, class, received, wpr, norm"),
    ("peaks", {"exponent": 0}, ValueError, "exponent must be above 0, got 0"),
    ("random", {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ("random", {"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
    ("random", {"seed": True}, TypeError, "seed must be an int, got True"),
    ("tome", {"reduction": "mean"}, ValueError, "reduction must be one of merge, drop, got 'mean'"),
    ("tome", {"inflection": 1.5}, ValueError, "inflection must be at most 1, got 1.5"),
    ("tome", {"inflection": -1.5}, ValueError, "inflection must be at least -1, got -1.5"),
    ("zero_tprune", {"start": "cls"}, ValueError, "start must be one of auto, class, uniform, got 'cls'"),
    ("zero_tprune", {"iters": 30}, ValueError, "iters must be three counts"),
    ("zero_tprune", {"iters": [30, 5]}, ValueError, "iters must be three counts"),
    ("zero_tprune", {"iters": [30, 5, 0]}, ValueError, "iters must be at least 1, got 0"),
    ("zero_tprune", {"iters": [30, 5, 1.5]}, TypeError, "iters must be an int, got 1.5"),
    ("zero_tprune", {"tol": -1e-9}, ValueError, "tol must be at least 0"),
    ("zero_tprune", {"tau": 0}, ValueError, "tau must be above 0, got 0"),
    ("zero_tprune", {"tau": "1"}, TypeError, "tau must be a number, got '1'"),
    ("zero_tprune", {"vmin": 0.8}, ValueError, "vmax must be at least 0.8, got 0.7"),
    ("zero_tprune", {"vmax": float("nan")}, ValueError, "vmax must be at least 0.01, got nan"),
    ("zero_tprune", {"similar": -1}, ValueError, "similar must be at least 0, got -1"),
    ("zero_tprune", {"similar": 1.5}, TypeError, "similar must be an int, got 1.5"),
    ("zero_tprune", {"metric": "l2"}, ValueError, "metric must be one of cosine, dot, euclidean, got 'l2'"),
    ("zero_tprune", {"partition": "half"}, ValueError, "partition must be one of unimportant, important, alternate"),
    ("zero_tprune", {"feature": "keys"}, ValueError, "feature must be one of key, key_heads, query, value, hidden"),
    ("zero_tprune", {"mid_block": "yes"}, TypeError, "mid_block must be True or False, got 'yes'"),
    ("zero_tprune", {"reduction": "mean"}, ValueError, "reduction must be one of drop, merge, got 'mean'"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), BAD_OPTIONS)
def test_bad_options(name, options, kind, message):
    with pytest.raises(kind, match=message):
        methods.create(name, **options)


def test_methods_are_immutable():
    with pytest.raises(AttributeError):
        methods.create("random").seed = 2
