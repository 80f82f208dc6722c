"""What the benchmarks of whole models do beside timing them: memory that stays, what a block costs in Python."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import torch
from click.testing import CliRunner
from host_models import images_for, make_host

from tokenprune_ext import methods

FAULTS = """
import resource, sys, torch
if sys.argv[1:]:
    from harness import keep_freed_memory
    keep_freed_memory()
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_again(bench: Path, folder: Path, *arguments: str) -> int:
    """Page faults of taking 64 MiB for the thirtieth time, in a process of its own: the first ones grow the heap."""
    command = (sys.executable, "-c", FAULTS, *arguments)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(bench)}, capture_output=True, text=True, check=True, cwd=folder
    )
    return int(done.stdout)


def test_freed_memory_is_kept(bench: Path, tmp_path: Path) -> None:
    assert faults_again(bench, tmp_path, "keep") < 100
    assert faults_again(bench, tmp_path) > 100  # or nothing would have to be kept


def test_page_faults_are_counted(bench: Path) -> None:
    whole = importlib.import_module("end_to_end")

    class Grows(torch.nn.Module):
        kept: ClassVar[list[torch.Tensor]] = []

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.kept.append(torch.ones(2**24))
            return images

    images = images_for(make_host("deit"))
    found = whole.page_faults({"grows": Grows(), "constant": torch.nn.Identity()}, images, rounds=3)
    assert found["grows"] > 10 * found["constant"] + 10


def test_overheads(bench: Path, tmp_path: Path) -> None:
    overhead = importlib.import_module("block_overhead")
    output = tmp_path / "records.jsonl"
    result = CliRunner().invoke(overhead.main, ["--budget", "0", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert len(output.read_text().splitlines()) == len(methods.available()) - 1
    for name in set(methods.available()) - {"dense"}:
        assert name in result.output
    for no_grad, mode in ((False, "inference_mode"), (True, "no_grad")):
        record = overhead.overheads("topk", "cpu", 0.0, no_grad)
        assert record["mode"] == mode
        assert all(record[f"{block}_s"] > 0 for block in overhead.BLOCKS)
