"""The bookkeeping of the microbenchmarks: what a record holds, what is refused, what the summary takes from records."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def harness(bench: Path) -> ModuleType:
    return importlib.import_module("harness")


@pytest.fixture(autouse=True)
def known_device(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 kB/s and 100 operations/s, instead of a measurement."""
    floors = importlib.import_module("floors")
    monkeypatch.setattr(harness, "rates", lambda device, dtype: floors.Rates(1e3, 1e2))


def case(harness: ModuleType, reference: float = 1.0, **options: Any) -> Any:
    def constant(value: float) -> Tensor:
        return torch.full((3,), value)

    return harness.Case(
        op="made_up",
        shape={"B": 1, "N": 3, "KIND": "odd one"},
        dtype=torch.float32,
        variants={"kernel": lambda: constant(1.0), "reference": lambda: constant(reference)},
        baselines={"another": lambda: constant(2.0)},
        **options,
    )


def test_record(harness: ModuleType) -> None:
    kernel, reference, other = harness.measure(case(harness, bytes_moved=2000, flops=300), 0.0)
    assert [record["variant"] for record in (kernel, reference, other)] == ["kernel", "reference", "another"]
    assert harness.shape_text(kernel) == "B=1 N=3 KIND=odd one"
    assert kernel["floor_s"] == 3  # by its operations; 2 by its bytes
    assert kernel["time_over_floor"] == pytest.approx(kernel["median_s"] / 3)
    assert reference["ratio"] == pytest.approx(reference["median_s"] / kernel["median_s"])
    assert "floor_s" not in other  # it computes something else


def test_variants_must_agree(harness: ModuleType) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        harness.measure(case(harness, reference=1.1, bytes_moved=1), 0.0)
    harness.measure(case(harness, reference=1.1, bytes_moved=1, compared=lambda result: result.shape), 0.0)


def test_summary_takes_the_last_measurement(harness: ModuleType, bench: Path, tmp_path: Path) -> None:
    summary = importlib.import_module("summary")
    where = {"device": "some device"}
    for bytes_moved in (1000, 2000):
        records = harness.measure(case(harness, bytes_moved=bytes_moved), 0.0)
        harness.append(tmp_path / "made_up.jsonl", records, where)
    (found,) = summary.read(tmp_path)
    assert list(found) == ["kernel", "reference", "another"]
    assert found["kernel"]["floor_s"] == 2
    assert summary.table([found]).row_count == 1
    figure = summary.plot([found], "some device")
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["made_up"]


@pytest.mark.parametrize("gigabytes", [8, 80])
def test_shapes_fit_the_device(bench: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: int) -> None:
    shapes = importlib.import_module("shapes")
    memory = gigabytes * 10**9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    found = shapes.attention_shapes("cuda")
    assert (64, 6, 197) in found
    assert ((64, 12, 577) in found) == (gigabytes == 80)
    assert max(batch * heads * tokens**2 * 4 for batch, heads, tokens in found) < memory / 4
