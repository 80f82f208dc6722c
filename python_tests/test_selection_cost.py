"""The benchmark of what choosing tokens costs: every method beside a twin with the same tokens that chooses nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from host_models import make_host

from tokenprune_ext import Schedule, apply, describe, methods, trace
from tokenprune_ext.methods import base


@pytest.fixture
def cost(bench: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("selection_cost")
    base._registry.pop(module.TWIN, None)  # importing it registers the twin, for all tests behind this one too
    monkeypatch.setitem(base._registry, module.TWIN, module.FirstTokens)
    return module


@pytest.mark.parametrize("name", [name for name in methods.available() if name != "dense"])
def test_the_twin_has_the_same_tokens_and_no_scores(cost: ModuleType, name: str) -> None:
    model = make_host("deit")
    schedule = Schedule.build(model, name, macs=cost.MACS)
    chosen, twin = (describe(apply(make_host("deit"), plan)) for plan in (schedule, cost.twin_of(schedule)))
    assert [(layer.tokens_in, layer.macs) for layer in twin.layers] == [
        (layer.tokens_in, layer.macs) for layer in chosen.layers
    ]
    assert twin.scoring_macs == 0


def test_the_twin_keeps_the_first_tokens(cost: ModuleType) -> None:
    schedule = cost.twin_of(Schedule.build(make_host("deit"), "topk", macs=cost.MACS))
    found = trace(apply(make_host("deit"), schedule).eval(), torch.randn(2, 3, *schedule.input_size))
    assert found.kept
    for layer, kept in found.kept.items():
        first = torch.arange(schedule.num_patches) < schedule.keep[layer]
        assert torch.equal(kept, first.expand(2, -1))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_record_a_method(cost: ModuleType, compiler: str) -> None:
    setting = cost.Setting("deit", 2, compiler)
    records = list(cost.selection_costs(make_host("deit"), setting, "cpu", torch.float32, budget_s=0.0))
    assert [record["method"] for record in records] == [name for name in methods.available() if name != "dense"]
    for record in records:
        assert record["compiler"] == compiler
        assert record["cost"] == pytest.approx(1 - record["first_tokens_s"] / record["median_s"])
