"""A run that is killed, wherever that is, ends with the same bits when it is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_training import forked, rows, stored, toy

from tokenprune_ext import checkpoint
from tokenprune_ext.train import log, state
from tokenprune_ext.train.run import Run

# Everything random is in it: dropped paths, dropout, augmentation, mixing; checkpoints are not at the ends of epochs.
SETTINGS: dict[str, Any] = dict(drop=0.2, mixup=0.4, cutmix=0.4, accumulate=2, save_every=3)
STEPS = 8


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, count: int, then: Callable[..., None] = lambda *_: None) -> Callable[[], None]:
    """Something that dies before the `count`-th call of owner.name."""

    def prepare() -> None:
        calls, real = [0], getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                then(*args)
                die()
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    return prepare


def half_a_checkpoint(content: Any, file: Path) -> None:
    real = torch.serialization.save
    real(content, file)
    file.write_bytes(file.read_bytes()[:1000])


def half_a_row(self: log.Log, *_: Any) -> None:
    self._file.write("6,2,0.000")
    self._file.flush()


MOMENTS = {
    "before the settings are there": before(state, "replacing", 1),
    "in the first step": before(Run, "advance", 1),
    "after a step that is not saved": before(Run, "after_step", 5),
    "in a row of the log": before(log.Log, "write", 4, half_a_row),
    "before the second checkpoint": before(state, "save", 2),
    "in the second checkpoint": before(torch, "save", 2, half_a_checkpoint),
    "before it replaces the first": before(os, "replace", 4),  # settings, empty log, first checkpoint
    "before the model is written": before(checkpoint, "save", 1),
}


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
    def killed() -> None:
        MOMENTS[moment]()
        toy(tmp_path / "run", **SETTINGS)

    assert forked(killed) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert forked(toy, tmp_path / "run", **SETTINGS) == [0]
    assert_same(tmp_path / "run", whole)


def test_killed_at_every_step(whole: Path, tmp_path: Path) -> None:
    """It still ends, with a checkpoint after every step."""
    often = {**SETTINGS, "save_every": 1}

    def killed() -> None:
        before(Run, "advance", 2)()
        toy(tmp_path / "run", **often)

    for _ in range(STEPS - 1):
        assert forked(killed) == [-signal.SIGKILL]
    assert forked(toy, tmp_path / "run", **often) == [0]
    ours, theirs = stored(tmp_path / "run"), stored(whole)
    assert_equal(ours["model"], theirs["model"])
    assert ours["step"] == STEPS


@pytest.mark.parametrize("method", ["vtp", "dynamicvit"])
def test_methods(tmp_path: Path, method: str) -> None:
    how = {**SETTINGS, "method": method}
    assert forked(toy, tmp_path / "whole", **how) == [0]

    def killed() -> None:
        MOMENTS["after a step that is not saved"]()
        toy(tmp_path / "run", **how)

    assert forked(killed) == [-signal.SIGKILL]
    assert forked(toy, tmp_path / "run", **how) == [0]
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_stays(whole: Path, tmp_path: Path) -> None:
    assert forked(toy, tmp_path / "run", **SETTINGS) == [0]
    assert toy(tmp_path / "run", **SETTINGS).resumed_at == STEPS
    assert_same(tmp_path / "run", whole)


def test_two_processes(tmp_path: Path) -> None:
    assert forked(toy, tmp_path / "whole", count=2, **SETTINGS) == [0, 0]

    def killed() -> None:
        if os.environ["RANK"] == "1":
            before(Run, "advance", 5)()
        toy(tmp_path / "run", **SETTINGS)

    assert -signal.SIGKILL in forked(killed, count=2)
    assert stored(tmp_path / "run")["step"] == 3
    assert forked(toy, tmp_path / "run", count=2, **SETTINGS) == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "whole")
    first, second = stored(tmp_path / "run")["random"]
    assert not torch.equal(first["torch"], second["torch"])
