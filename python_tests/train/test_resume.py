"""A run that is killed, wherever that is, ends with the same bits when it is started again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_training import MOMENTS, killed_toy
from safetensors.torch import load_file
from toy_training import forked, rows, stored, toy

# Everything random is in it: dropped paths, dropout, augmentation, mixing; checkpoints are not at the ends of epochs.
SETTINGS: dict[str, Any] = dict(drop=0.2, mixup=0.4, cutmix=0.4, accumulate=2, save_every=3)
STEPS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked(toy, folder, **SETTINGS) == [0]
    return folder


def assert_equal(ours: Any, theirs: Any) -> None:
    """Plain values and tensors, in dicts and sequences of any depth."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict | list | tuple):
        assert len(ours) == len(theirs)
        items = ((ours[key], theirs[key]) for key in (ours if isinstance(ours, dict) else range(len(ours))))
        for one, other in items:
            assert_equal(one, other)
    else:
        assert ours == theirs


def assert_same(folder: Path, whole: Path) -> None:
    assert_equal(load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert_equal(stored(folder), stored(whole))
    assert rows(folder) == rows(whole)
    left = {file.name for file in folder.iterdir()}
    assert left == {".lock", "run.json", "metrics.csv", "checkpoint.pt", "model.safetensors"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(whole: Path, tmp_path: Path, moment: str) -> None:
    assert forked(killed_toy, moment, tmp_path / "run", **SETTINGS) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert forked(toy, tmp_path / "run", **SETTINGS) == [0]
    assert_same(tmp_path / "run", whole)


def test_killed_at_every_step(whole: Path, tmp_path: Path) -> None:
    """It still ends, with a checkpoint after every step."""
    often = {**SETTINGS, "save_every": 1}
    for _ in range(STEPS - 1):
        assert forked(killed_toy, "in the second step", tmp_path / "run", **often) == [-signal.SIGKILL]
    assert forked(toy, tmp_path / "run", **often) == [0]
    ours, theirs = stored(tmp_path / "run"), stored(whole)
    assert_equal(ours["model"], theirs["model"])
    assert ours["step"] == STEPS


@pytest.mark.parametrize("method", ["vtp", "dynamicvit"])
def test_methods(tmp_path: Path, method: str) -> None:
    how = {**SETTINGS, "method": method}
    assert forked(toy, tmp_path / "whole", **how) == [0]
    assert forked(killed_toy, "after a step that is not saved", tmp_path / "run", **how) == [-signal.SIGKILL]
    assert forked(toy, tmp_path / "run", **how) == [0]
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_stays(whole: Path, tmp_path: Path) -> None:
    assert forked(toy, tmp_path / "run", **SETTINGS) == [0]
    assert toy(tmp_path / "run", **SETTINGS).resumed_at == STEPS
    assert_same(tmp_path / "run", whole)


def test_two_processes(tmp_path: Path) -> None:
    assert forked(toy, tmp_path / "whole", count=2, **SETTINGS) == [0, 0]
    died = forked(killed_toy, "in the fifth step", tmp_path / "run", rank=1, count=2, **SETTINGS)
    assert -signal.SIGKILL in died
    assert stored(tmp_path / "run")["step"] == 3
    assert forked(toy, tmp_path / "run", count=2, **SETTINGS) == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "whole")
    first, second = stored(tmp_path / "run")["random"]
    assert not torch.equal(first["torch"], second["torch"])
