"""Two processes train as one with the same images a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from toy_training import forked, rows, toy

from tokenprune_ext.cli_train import train

# The last step of an epoch has one image: the second process has none.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": dict(mixup=0.4, cutmix=0.4),
    "accumulated": dict(accumulate=3, clip_grad=0.1),
    "workers": dict(workers=1),
    "gates": dict(method="vtp"),
    "predictors": dict(method="dynamicvit", accumulate=2, mixup=0.2),
}


def assert_close(one: Path, two: Path) -> None:
    ours, theirs = rows(one), rows(two)
    assert len(ours) == len(theirs) > 2
    for row, other in zip(ours, theirs, strict=True):
        assert row["step"] == other["step"]
        assert row["lr"] == other["lr"]
        for name in row.keys() - {"step", "lr", "epoch", "top1"}:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-6), name
        assert row["top1"] == other["top1"]
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_same_curve(tmp_path: Path, case: str) -> None:
    how = {"log_every": 1, **CASES[case]}
    toy(tmp_path / "one", **how)
    assert forked(toy, tmp_path / "two", count=2, **how) == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two")


def test_three_processes(tmp_path: Path) -> None:
    toy(tmp_path / "one", log_every=1, mixup=0.2)
    assert forked(toy, tmp_path / "three", count=3, log_every=1, mixup=0.2) == [0, 0, 0]
    assert_close(tmp_path / "one", tmp_path / "three")


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    toy(tmp_path / "one", log_every=1)
    toy(tmp_path / "parts", log_every=1, accumulate=4)
    assert_close(tmp_path / "one", tmp_path / "parts")


def test_torchrun(tmp_path: Path) -> None:
    """The command, on the packaged model; one process here, two there."""
    # SGD: Adam makes whole steps of the rounding errors where a gradient is zero, as that of a key's bias.
    wanted = "finetune --demo --images 10 --held-out-images 8 --batch-size 4 --epochs 1 --log-every 1 --device cpu"
    wanted += " --opt sgd --lr 0.01"
    one = CliRunner().invoke(train, [*wanted.split(), "--output", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    (tmp_path / "command.py").write_text("from tokenprune_ext.cli_train import train\n\ntrain()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, "command.py", *wanted.split(), "--output", "two"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("wrote two") == 1  # the first process alone
    assert_close(tmp_path / "one", tmp_path / "two")
