"""Methods that users write and register."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext import methods
from tokenprune_ext.methods import base
from tokenprune_ext.patch import AttentionContext, Reduced
from tokenprune_ext.prune import apply, schedule_of, trace


@dataclass(frozen=True, kw_only=True)
class FirstTokens(methods.ScoredMethod):
    """A method as a user would write one: a score, and any reduction."""

    name: ClassVar[str] = "first_tokens"

    def default_layers(self, depth):
        return (depth // 2,)

    def scores(self, ctx: AttentionContext):
        batch, tokens = ctx.x.shape[:2]
        return 1.0 / torch.arange(1, tokens + 1, dtype=torch.float32).expand(batch, -1)


@dataclass(frozen=True, kw_only=True)
class Halves(methods.Method):
    """One with a reduction of its own: neighbours become their mean."""

    name: ClassVar[str] = "halves"

    def default_layers(self, depth):
        return (1,)

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        batch, prefix = ctx.x.shape[0], ctx.num_prefix
        pairs = ctx.x[:, prefix : prefix + 2 * keep].unflatten(1, (keep, 2)).mean(2)
        kept = torch.arange(prefix, prefix + 2 * keep, 2).expand(batch, -1)
        into = torch.arange(ctx.x.shape[1]).sub(prefix).div(2, rounding_mode="floor").mul(2).add(prefix)
        into = into.where(into >= prefix, -1).expand(batch, -1)
        return Reduced(torch.cat([ctx.x[:, :prefix], pairs], 1), kept, into=lambda: into)

    def min_keep(self, entering):
        return entering // 2

    def scoring_macs(self, cost, host, layer, tokens, keep):
        return 0


@pytest.fixture
def registry(monkeypatch):
    """The registry, as it was again afterwards."""
    monkeypatch.setattr(base, "_registry", dict(base._registry))


@pytest.mark.usefixtures("registry")
def test_a_scored_method_of_ones_own():
    model = make_host("vit")
    with pytest.raises(ValueError, match="unknown method 'first_tokens'"):
        apply(model, FirstTokens(), keep=0.5)
    methods.register(FirstTokens)
    assert methods.register(FirstTokens) is FirstTokens
    images = images_for(model)
    sources = trace(apply(model, "first_tokens", keep=0.5), images).sources
    assert sources[2].tolist() == [[*range(8), *[-1] * 8]] * 2
    for reduction in ("mean", "weighted", "sum"):
        sources = trace(apply(model, FirstTokens(reduction=reduction), keep=[8]), images).sources
        assert sources[2].tolist() == [[*range(7), *[7] * 9]] * 2
    merged = trace(apply(model, FirstTokens(reduction="merge"), layers=[0, 1], keep=[8, 4]), images).sources[1]
    assert merged.min() == 0
    assert merged.max() == 3
    assert schedule_of(model).options == {"class_token_only": False, "proportional": True, "reduction": "merge"}
    assert apply(model, FirstTokens(class_token_only=True), macs=0.8)(images).shape == (2, 10)

    @dataclass(frozen=True, kw_only=True)
    class Impostor(FirstTokens):
        """Has the same name."""

    with pytest.raises(ValueError, match="name 'first_tokens' is taken by FirstTokens"):
        methods.register(Impostor)
    with pytest.raises(ValueError, match="Impostor is not the class registered as 'first_tokens'"):
        apply(model, Impostor(), keep=0.5)


@pytest.mark.usefixtures("registry")
def test_a_whole_method_of_ones_own():
    methods.register(Halves)
    model = apply(make_host("vit"), "halves", keep=0.5)
    traced = trace(model, images_for(model))
    assert traced.sources[1].tolist() == [[patch // 2 for patch in range(16)]] * 2
    assert traced.output.shape == (2, 10)
    with pytest.raises(ValueError, match=r"keep\[1\] is 7, but halves leaves at least 8 of 16"):
        apply(model, "halves", keep=[7])
