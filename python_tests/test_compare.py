"""The comparison as a whole on a small random model: rows, sharing of weights, budgets, schedules, pictures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tokenprune_ext import latency, methods
from tokenprune_ext.compare import DENSE, CompareError, Comparison, compare, share
from tokenprune_ext.data import batches, preprocessing
from tokenprune_ext.evaluate import evaluate
from tokenprune_ext.prune import apply, describe, schedule_of
from tokenprune_ext.schedule import Schedule

CLASSES = 5


class Noise:
    """Random images with a label; an `ImageSource` without files."""

    def __init__(self, count: int, labelled: bool = True) -> None:
        self.count, self.labelled = count, labelled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()), index % CLASSES if self.labelled else -1


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=CLASSES).eval()


def run(model: nn.Module, images: Noise | None = None, **options) -> Comparison:
    config, transform = preprocessing(model, img_size=64, crop_pct=1.0)
    given = {"methods": {}, "budgets": (0.7,), "latency_budget_s": None, "batch_size": 4, **options}
    return compare(model, images or Noise(6), transform, data_config=config, **given)


def test_every_method_at_every_budget_gets_a_row(model: nn.Module) -> None:
    chosen = {name: methods.create(name) for name in methods.available()}
    result = run(model, methods=chosen, budgets=(0.7, 0.8), latency_budget_s=0.0)
    pruning = [name for name in chosen if name != "dense"]  # which is the first row
    assert [row.name for row in result.rows] == [DENSE] + [f"{m} {b} %" for m in pruning for b in (80, 70)]
    dense, *pruned = result.rows
    assert (dense.macs.blocks_fraction, dense.schedule, dense.latency.speedup) == (1.0, None, 1.0)
    assert (dense.macs.scoring, dense.macs.charged_fraction) == (0, 1.0)
    for row in pruned:
        assert 0.5 * row.budget < row.macs.charged_fraction <= row.budget
        assert (row.macs.scoring > 0) == (row.method != "random")
        charged = row.macs.blocks + row.macs.scoring
        assert row.macs.charged_fraction == pytest.approx(charged / dense.macs.blocks)
        assert row.macs.model_fraction > row.macs.blocks_fraction
        assert row.accuracy.images == 6
        assert row.latency.images_per_s == pytest.approx(4 / row.latency.median_s)
        assert row.peak_memory > 0
        assert row.accuracy.top1_change == pytest.approx(row.accuracy.top1 - dense.accuracy.top1)
    assert any(row.accuracy.kl > 0 for row in pruned)
    assert not any("left out" in note for note in result.notes)


def test_a_method_that_prunes_nothing_gets_one_row_without_a_budget(model: nn.Module) -> None:
    label = "dense:class_token_only=true"
    chosen = {label: methods.create("dense", class_token_only=True), "topk": methods.create("topk")}
    result = run(model, methods=chosen, budgets=(0.7, 0.9))
    assert [row.name for row in result.rows] == [DENSE, label, "topk 90 %", "topk 70 %"]
    row = result.rows[1]
    assert (row.method, row.budget, row.schedule["keep"]) == (label, None, {})
    assert row.macs.scoring == 0
    assert row.macs.charged_fraction == row.macs.blocks_fraction < 1
    assert row.accuracy.agreement == 1
    assert row.accuracy.kl == pytest.approx(0, abs=1e-6)
    assert not result.notes
    assert [each.variant for each in result.pictures[0].progressions] == ["topk 90 %"]  # dense drops nothing
    with pytest.raises(CompareError, match="method dense: another row has this name"):
        run(model, methods={"dense": chosen[label]})


def test_rows_are_what_a_pruned_model_does_on_its_own(model: nn.Module) -> None:
    row = run(model, methods={"topk": methods.create("topk")}).rows[1]
    _, transform = preprocessing(model, img_size=64, crop_pct=1.0)
    alone = apply(timm.create_model("test_vit", img_size=64, num_classes=CLASSES).eval(), "topk", macs=0.7)
    alone.load_state_dict(model.state_dict())
    assert row.schedule == json.loads(json.dumps(row.schedule)) | {"input_size": (64, 64), "keep": row.schedule["keep"]}
    assert row.schedule["keep"] == schedule_of(alone).keep
    assert row.macs.blocks == describe(alone).blocks_macs
    expected = evaluate({"dense": model, "pruned": alone}, batches(Noise(6), transform, 4))["pruned"]
    assert row.accuracy.agreement == expected.agreement
    assert row.accuracy.kl == pytest.approx(expected.kl, rel=1e-6)


def test_the_given_model_stays_dense(model: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    run(model, methods={"pomt": methods.create("pomt")})
    assert describe(model).method is None
    assert torch.equal(model(images), before)


def test_copies_share_their_weights(model: nn.Module) -> None:
    model.register_buffer("table", torch.zeros(3))
    twin = share(model)
    assert twin is not model
    assert twin.blocks[0] is not model.blocks[0]
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.table is model.table


def test_schedules_get_rows_of_their_own(model: nn.Module) -> None:
    schedule = Schedule.build(model, "topk", layers=[2], keep=[9])
    result = run(model, methods={"topk": methods.create("topk")}, schedules={"mine": schedule})
    assert [row.name for row in result.rows] == [DENSE, "topk 70 %", "mine"]
    assert result.rows[2].schedule["keep"] == {2: 9}
    assert result.rows[2].budget is None


def test_budget_out_of_reach_is_noted_and_others_go_on(model: nn.Module) -> None:
    result = run(model, methods={"pomt": methods.create("pomt")}, budgets=(0.05, 0.8))
    assert [row.name for row in result.rows] == [DENSE, "pomt 80 %"]
    assert len(result.notes) == 1
    assert result.notes[0].startswith("pomt 5 % left out: ")


def test_nothing_to_compare_is_refused(model: nn.Module) -> None:
    with pytest.raises(CompareError, match=r"nothing to compare: pomt 5 % left out"):
        run(model, methods={"pomt": methods.create("pomt")}, budgets=(0.05,))
    for chosen in ({}, {"dense": methods.create("dense")}):
        with pytest.raises(CompareError, match="no schedule and no method that changes the model given"):
            run(model, methods=chosen)


def test_model_that_cannot_be_pruned_is_refused_once() -> None:
    resnet = timm.create_model("resnet18", num_classes=CLASSES)
    with pytest.raises(CompareError, match="not supported") as caught:
        run(resnet, methods={"topk": methods.create("topk"), "pomt": methods.create("pomt")})
    assert str(caught.value).count("not supported") == 1


def test_schedule_of_another_model_is_refused(model: nn.Module) -> None:
    other = Schedule.build(timm.create_model("test_vit"), "topk", keep=0.5)
    with pytest.raises(CompareError, match=r"schedule other: .*input_size"):
        run(model, schedules={"other": other})
    with pytest.raises(CompareError, match="schedule dense: another row has this name"):
        run(model, schedules={"dense": Schedule.build(model, "topk", keep=0.5)})


def test_unlabelled_and_untimed_figures_are_none(model: nn.Module) -> None:
    result = run(model, Noise(5, labelled=False), methods={"random": methods.create("random")})
    row = result.rows[1]
    assert row.latency is None
    assert (row.accuracy.top1, row.accuracy.top1_change) == (None, None)
    assert result.pictures[0].label is None


def test_pictures_show_what_the_schedule_keeps(model: nn.Module) -> None:
    chosen = {name: methods.create(name) for name in ("topk", "pomt")}
    result = run(model, methods=chosen, budgets=(0.9, 0.7, 0.6), class_names=list("abcde"), picture_count=3)
    assert [picture.name for picture in result.pictures] == ["image 0", "image 2", "image 4"]
    assert [picture.label for picture in result.pictures] == ["a", "c", "e"]
    rows = {row.name: row for row in result.rows}
    for picture, index in zip(result.pictures, (0, 2, 4), strict=True):
        original = torch.from_numpy(picture.pixels.copy())
        assert torch.equal(original, torch.from_numpy(np.array(Noise(6)[index][0])))
        topk, pomt = picture.progressions
        assert (topk.variant, pomt.variant) == ("topk 70 %", "pomt 70 %")
        for progression in (topk, pomt):
            keep = rows[progression.variant].schedule["keep"]
            for stage in progression.stages:
                counts = stage.counts
                assert stage.tokens == counts["kept"] + (1 if counts["merged"] else 0) == keep[stage.block]
                assert sum(counts.values()) == stage.source.size == 16
        assert all(stage.counts["merged"] == 0 for stage in topk.stages)
        assert all(stage.counts["dropped"] == 0 for stage in pomt.stages)


def test_everything_measured_goes_into_json(model: nn.Module) -> None:
    result = run(model, methods={"topk": methods.create("topk")}, latency_budget_s=0.0)
    found = json.loads(json.dumps(result.to_dict()))
    assert found["settings"]["batch_size"] == 4
    assert found["settings"]["preprocessing"]["input_size"] == [3, 64, 64]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert len(found["rows"][1]["latency"]["rounds_s"]) >= 3
    assert found["rows"][1]["accuracy"]["images"] == 6


@pytest.mark.parametrize(("slow", "noted"), [(1.05, False), (2.0, True)])
def test_noisy_latency_is_noted(model: nn.Module, monkeypatch: pytest.MonkeyPatch, slow: float, noted: bool) -> None:
    times = itertools.cycle([1.0, 1.0, slow, slow])
    monkeypatch.setattr(latency, "_time_on_cpu", lambda call: next(times))
    notes = run(model, methods={"topk": methods.create("topk")}, latency_budget_s=0.0).notes
    assert [note.startswith("latency is unreliable") for note in notes] == [True] * noted


def test_bfloat16_is_a_cast_of_weights_and_inputs(model: nn.Module) -> None:
    result = run(model, methods={"topk": methods.create("topk")}, dtype=torch.bfloat16)
    assert result.settings["dtype"] == "bfloat16 (weights and inputs cast, no autocast)"
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert 0 <= result.rows[1].accuracy.kl < 10
