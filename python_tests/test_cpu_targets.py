"""The table of CPU targets: every operator is in it at every size, and what misses its target is said to."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from tokenprune_ext import ops


@pytest.fixture(scope="module")
def targets(bench: Path) -> ModuleType:
    return importlib.import_module("cpu_targets")


@pytest.fixture
def one_head(targets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The sizes that have a target, with one head each: batches and tokens."""
    sizes = set(itertools.product(targets.BATCHES, targets.TOKENS))
    shapes = importlib.import_module("shapes")
    assert sizes <= {(batch, tokens) for batch, _, tokens in shapes.ON_CPU}
    monkeypatch.setattr(shapes, "ON_CPU", (*((batch, 1, tokens) for batch, tokens in sizes), (1, 1, 33), (2, 1, 197)))
    return sizes


@pytest.mark.parametrize("op", ops.__all__)
def test_every_operator_has_every_size(targets: ModuleType, one_head: set[tuple[int, int]], op: str) -> None:
    found = list(targets.cases(op, torch.float32))
    assert {case.op for case in found} == {op}
    assert {(case.shape["B"], case.shape["N"]) for case in found} == one_head
    for case in found:
        assert case.dtype == torch.float32
        assert {"kernel", "reference"} <= case.variants.keys()


@pytest.mark.parametrize(
    ("op", "target"), [("wpr_qk", 1.2), ("nearest_token", 1.2), ("wpr", 1.5), ("peaks_match", 1.5)]
)
def test_what_holds(targets: ModuleType, op: str, target: float) -> None:
    common = {"op": op, "median_s": 1.0, "time_over_floor": 2.0}

    def holds(ratio: float) -> str:
        kernel = {**common, "variant": "kernel", "B": 1, "N": 197, "dtype": "float32", "ratio": 1.0}
        return targets.row([kernel, {**kernel, "variant": "reference", "ratio": ratio}], 2)[-1]

    assert (holds(target - 0.001), holds(target)) == ("NO", "yes")


def test_operators_by_the_mean_of_their_cases(targets: ModuleType) -> None:
    """A geometric one: a case of 1 outweighs one of 2.25, but not one of 2.5."""

    def record(tokens: int, ratio: float, variant: str = "reference") -> dict[str, object]:
        return {"op": "wpr", "N": tokens, "variant": variant, "ratio": ratio}

    records = [record(197, 1.0), record(197, 2.5), record(197, 9.0, "eager"), record(577, 1.0), record(577, 2.24)]
    assert list(targets.by_operator(records, 2)) == [
        ("wpr", "197", "2", "2", "1.58 x", "1.00 x", "1.5 x", "yes"),
        ("wpr", "577", "2", "2", "1.50 x", "1.00 x", "1.5 x", "NO"),
    ]


@pytest.mark.parametrize("op", ["attn_colsum", "wpr"])
def test_reading_is_timed_where_the_input_is_much(
    targets: ModuleType, one_head: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    floors = importlib.import_module("floors")
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "rates", lambda device, dtype: floors.Rates(1e9, 1e9))
    case = next(targets.cases(op, torch.float32))
    records = {record["variant"]: record for record in harness.measure(case, 0.0)}
    assert "floor_s" not in records[harness.READ]  # it computes something else
    records[harness.READ]["ratio"] = 0.8  # of the kernel's time
    assert targets.row(list(records.values()), 2)[5] == "1.25"
    del records[harness.READ]
    assert targets.row(list(records.values()), 2)[5] == ""


def test_command(
    targets: ModuleType, one_head: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    floors = importlib.import_module("floors")
    monkeypatch.setattr(importlib.import_module("harness"), "rates", lambda device, dtype: floors.Rates(1e9, 1e9))
    monkeypatch.setattr(targets, "has_kernel", lambda op, device: True)
    options = ["--op", "head_aggregate", "--threads", "1", "--budget", "0", "--output", str(tmp_path / "records.jsonl")]
    result = CliRunner().invoke(targets.main, options)
    assert result.exit_code == 0, result.output
    for batch, tokens in one_head:
        assert f"B={batch} H=1 N={tokens}" in result.output
    assert re.search(r"^\d of 4 cases hold$", result.output, re.MULTILINE)
    assert re.search(r"^\d of 2 operators by number of tokens and threads hold\n\Z", result.output, re.MULTILINE)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 8  # kernel and reference
