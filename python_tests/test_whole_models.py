"""What the benchmarks of whole models do beside timing them: page faults, what a block costs in Python."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import ClassVar

import torch
from click.testing import CliRunner
from host_models import images_for, make_host

from tokenprune_ext import methods


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
