"""The rules every method keeps, the registry, and the options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from host_models import images_for, make_host
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenprune_ext import methods
from tokenprune_ext.methods import base
from tokenprune_ext.patch import AttentionContext
from tokenprune_ext.prune import apply

NAMES = ("pomt", "random", "topk", "zero_tprune")


def context(batch=2, heads=2, tokens=12, dim=4, prefix=1, layer=3, depth=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, dim, generator=generator).double() for _ in range(3))
    return AttentionContext(q, k, v, dim**-0.5, prefix, prefix > 0, layer, depth)


def take(ctx, batch=slice(None), tokens=slice(None)):
    """The context of some images, or with its tokens in another order."""
    q, k, v = (part[batch][:, :, tokens] for part in (ctx.q, ctx.k, ctx.v))
    return AttentionContext(q, k, v, ctx.scale, ctx.num_prefix, ctx.has_class_token, ctx.layer, ctx.depth)


def test_available():
    assert methods.available() == NAMES
    assert [methods.create(name).name for name in NAMES] == list(NAMES)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 5), st.integers(2, 14), st.data())
def test_reduction(name, prefix, patches, data):
    """Prefix in front, kept tokens in order and with the highest scores, the rest gone or fused last."""
    method = methods.create(name)
    keep = data.draw(st.integers(method.min_keep, patches))
    ctx = context(tokens=prefix + patches, prefix=prefix, seed=data.draw(st.integers(0, 99)))
    x = torch.arange(prefix + patches).double().expand(2, -1).unsqueeze(-1) * torch.ones(3)
    reduced = method.reduce(x, ctx, keep)
    assert reduced.x.shape == (2, prefix + keep, 3)
    assert reduced.fused == (name == "pomt")
    kept = keep - reduced.fused
    assert reduced.index.shape == (2, kept)
    scores = method.scores(ctx)
    for image in range(2):
        ranked = sorted(range(prefix, prefix + patches), key=lambda token: (-scores[image, token].item(), token))
        best = sorted(ranked[:kept])
        assert reduced.index[image].tolist() == best
        lost = sorted(ranked[kept:])
        fused = [sum(lost) / len(lost)] if reduced.fused else []
        wanted = torch.tensor([*range(prefix), *best, *fused]).double()
        torch.testing.assert_close(reduced.x[image], wanted.unsqueeze(-1).expand(-1, 3))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 5), st.integers(0, 99))
def test_scores_of_an_image_do_not_depend_on_the_batch(name, prefix, seed):
    method = methods.create(name)
    ctx = context(batch=3, prefix=prefix, seed=seed)
    together = method.scores(ctx)
    for image in range(3):
        alone = method.scores(take(ctx, batch=slice(image, image + 1)))
        torch.testing.assert_close(alone[0], together[image], rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["pomt", "topk", "zero_tprune"]), st.integers(0, 4), st.permutations(range(8)))
def test_scores_follow_a_permutation_of_the_patches(name, prefix, order):
    method = methods.create(name)
    ctx = context(tokens=prefix + 8, prefix=prefix)
    tokens = torch.tensor([*range(prefix), *(prefix + patch for patch in order)])
    moved = method.scores(take(ctx, tokens=tokens))
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
    ctx = context(batch=1, tokens=tokens, prefix=0)
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
    images = images_for(model, batch=3)
    model.train()
    assert torch.equal(model(images), model(images))


DEFAULT_LAYERS = {
    "pomt": {12: (3,), 40: (10,), 24: (6,), 4: (1,), 2: (0,), 1: (0,)},
    "random": {12: (3, 6, 9), 24: (6, 12, 18), 40: (10, 20, 30), 6: (1, 3, 4), 4: (1, 2, 3), 2: (0, 1), 1: (0,)},
    "zero_tprune": {12: (2, 5, 8), 24: (5, 11, 17), 40: (9, 19, 29), 4: (0, 1, 2), 2: (0,), 1: (0,)},
}
DEFAULT_LAYERS["topk"] = DEFAULT_LAYERS["random"]


@pytest.mark.parametrize("name", NAMES)
def test_default_layers(name):
    method = methods.create(name)
    for depth, layers in DEFAULT_LAYERS[name].items():
        assert method.default_layers(depth) == layers
    for depth in range(1, 50):
        layers = method.default_layers(depth)
        assert layers == tuple(sorted(set(layers)))
        assert 0 <= layers[0] <= layers[-1] < depth


def test_zero_tprune_iterations_at_other_depths():
    method = methods.create("zero_tprune", iters=(7, 3, 2))
    assert [method.iterations(layer, 4) for layer in range(4)] == [7, 3, 3, 2]
    assert [method.iterations(layer, 24) for layer in (0, 5, 6, 17, 18, 23)] == [7, 7, 3, 3, 2, 2]
    assert [method.iterations(layer, 2) for layer in range(2)] == [3, 3]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 1000))
@example(patches=100, thousandths=290)  # 0.29 * 100 is 28.999999999999996 in floating point
def test_keep_count_is_the_floor_of_the_exact_product(patches, thousandths):
    assert methods.create("topk").keep_count(thousandths / 1000, patches) == thousandths * patches // 1000


@pytest.mark.parametrize(
    "method",
    [
        methods.create("pomt", feature="k", head_reduce="sum"),
        methods.create("random", seed=7),
        methods.create("topk"),
        methods.create("zero_tprune", start="uniform", iters=(9, 8, 7), tol=0.0, tau=0.5, vmin=0.1, vmax=0.2),
    ],
    ids=repr,
)
def test_options_survive_json(method):
    options = json.loads(json.dumps(method.options()))
    assert methods.create(method.name, **options) == method
    assert hash(methods.create(method.name, **options)) == hash(method)


BAD_OPTIONS = [
    ("best", {}, ValueError, "unknown method 'best'; available: pomt, random, topk, zero_tprune"),
    ("topk", {"rate": 1}, ValueError, "method 'topk' has no option rate; it has: none"),
    ("pomt", {"name": "x"}, ValueError, "method 'pomt' has no option name; it has: feature, head_reduce"),
    ("pomt", {"feature": "x"}, ValueError, "feature must be one of v, k, q, got 'x'"),
    ("pomt", {"head_reduce": "min"}, ValueError, "head_reduce must be one of max, mean, sum, got 'min'"),
    ("random", {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ("random", {"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
    ("random", {"seed": True}, TypeError, "seed must be an int, got True"),
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
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), BAD_OPTIONS)
def test_bad_options(name, options, kind, message):
    with pytest.raises(kind, match=message):
        methods.create(name, **options)


@dataclass(frozen=True)
class FirstTokens(methods.Method):
    """A method as a user would write one."""

    name: ClassVar[str] = "first_tokens"

    def default_layers(self, depth):
        return (depth // 2,)

    def scores(self, ctx):
        tokens = ctx.q.shape[2]
        return -torch.arange(tokens, dtype=torch.float32).expand(ctx.q.shape[0], -1)


def test_a_method_of_ones_own(monkeypatch):
    model = make_host("vit")
    with pytest.raises(ValueError, match="unknown method 'first_tokens'"):
        apply(model, FirstTokens(), keep=0.5)
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    methods.register(FirstTokens)
    assert methods.register(FirstTokens) is FirstTokens
    images = images_for(model)
    assert apply(model, "first_tokens", keep=0.5)(images).shape == (2, 10)

    @dataclass(frozen=True)
    class Impostor(FirstTokens):
        """Has the same name."""

    with pytest.raises(ValueError, match="name 'first_tokens' is taken by FirstTokens"):
        methods.register(Impostor)
    with pytest.raises(ValueError, match="Impostor is not the class registered as 'first_tokens'"):
        apply(model, Impostor(), keep=0.5)


def test_methods_are_immutable():
    with pytest.raises(AttributeError):
        methods.create("random").seed = 2
