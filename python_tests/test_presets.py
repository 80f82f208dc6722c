"""Schedules that come with the package: they fit the models they name, at the MACs their papers publish."""

from __future__ import annotations

import pytest
import timm
from click.testing import CliRunner

from tokenprune_ext import apply, describe, presets, schedule_of
from tokenprune_ext.cli import main

NAMES = (
    "zero_tprune-deit_small_patch16_224-a",
    "zero_tprune-deit_small_patch16_224-b",
    "zero_tprune-deit_small_patch16_224-c",
    "zero_tprune-vit_base_patch16_384-mae",
    "zero_tprune-vit_base_patch16_384-swag",
    "zero_tprune-vit_small_patch16_224",
)
PUBLISHED = (2.97, 2.50, 3.97, 42.3, 43.8, 2.79)  # GMACs of the blocks, Zero-TPrune, CVPR 2024


def test_available():
    assert presets.available() == NAMES
    with pytest.raises(ValueError, match="no preset 'best'; available: zero_tprune-deit_small_patch16_224-a, "):
        presets.load("best")


@pytest.mark.parametrize(("name", "published"), zip(NAMES, PUBLISHED, strict=True))
def test_presets_reach_the_published_macs(name, published):
    schedule = presets.load(name)
    model = apply(timm.create_model(schedule.model), schedule)
    assert schedule_of(model) == schedule
    macs = describe(model).blocks_macs / 1e9
    assert 0.99 * published < macs <= published
    assert schedule.origin["blocks_gmacs"] == pytest.approx(macs, abs=1e-3)
    assert str(published) in schedule.origin["published"]
    assert schedule.origin["search"]["images"] >= 500
    assert "python bench/presets.py" in schedule.origin["command"]
    assert name == f"{schedule.method}-{schedule.model}" + name.partition(schedule.model)[2]


def test_commands_take_presets_by_name():
    command = ["describe", "--model", "deit_small_patch16_224", "--schedule"]
    shown = CliRunner().invoke(main, [*command, NAMES[0]])
    assert shown.exit_code == 0, shown.output
    assert "zero_tprune, pruning at blocks" in shown.output
    missing = CliRunner().invoke(main, [*command, "zero_tprune-d"])
    assert missing.exit_code == 2
    assert "no file and no preset 'zero_tprune-d'; presets: zero_tprune-deit_small" in " ".join(missing.output.split())
