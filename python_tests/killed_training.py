"""Training runs that die at a chosen moment: for processes of their own (`toy_training.forked`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from toy_training import toy

from tokenprune_ext import checkpoint
from tokenprune_ext.cli_train import train
from tokenprune_ext.train import log, state
from tokenprune_ext.train.run import Run


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


MOMENTS: dict[str, Callable[[], None]] = {
    "before the settings are there": before(state, "replacing", 1),
    "in the first step": before(Run, "advance", 1),
    "in the second step": before(Run, "advance", 2),
    "in the fifth step": before(Run, "advance", 5),
    "after a step that is not saved": before(Run, "after_step", 5),
    "in a row of the log": before(log.Log, "write", 4, half_a_row),
    "before the second checkpoint": before(state, "save", 2),
    "in the second checkpoint": before(torch, "save", 2, half_a_checkpoint),
    "before it replaces the first": before(os, "replace", 4),  # settings, empty log, first checkpoint
    "before the model is written": before(checkpoint, "save", 1),
}


def killed_toy(moment: str, output: Path, rank: int = 0, **how: Any) -> None:
    """The process of this rank dies; the others may wait for it."""
    if os.environ["RANK"] == str(rank):
        MOMENTS[moment]()
    toy(output, **how)


def run_on_files(command: str, inputs: Path, output: Path, *more: object) -> Result:
    """A subcommand of `tokenprune train`, on the inputs of the tests."""
    model = ("--model", "test_vit", "--img-size", 64, "--weights", inputs / "w.safetensors", "--device", "cpu")
    how = ("--data", inputs / "images.tsv", "--batch-size", 4, "--epochs", 1, "--threads", 1, "--output", output)
    return CliRunner().invoke(train, [command, *map(str, (*model, *how, *more))])


def killed_before_model(number: int, *args: Any) -> None:
    """It dies before it writes the model file of this number, from 1."""
    before(checkpoint, "save", number)()
    assert run_on_files(*args).exit_code == 0
