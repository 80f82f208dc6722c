"""The bookkeeping of the latency rounds with a fake clock, and peak memory of known allocations."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tokenprune_ext import latency
from tokenprune_ext.latency import measure_latency, peak_memory

FAULTS = """
import resource, sys, torch
from tokenprune_ext.latency import keep_freed_memory
for device in sys.argv[1:]:
    keep_freed_memory(device)
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


class Named(nn.Module):
    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds = iter(seconds)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Replaces the clock: a model says itself how long it takes; the order of the calls is recorded."""
    order: list[nn.Module] = []

    def clock(call: partial[Tensor]) -> float:
        model = call.func
        assert isinstance(model, Named)
        order.append(model)
        return next(model.seconds)

    monkeypatch.setattr(latency, "_time_on_cpu", clock)
    monkeypatch.setattr(Named, "forward", lambda self, images: images, raising=False)
    return order


def test_medians_quantiles_and_speedup(calls: list[nn.Module]) -> None:
    dense, fast = Named([1.0, 3.0, 2.0]), Named([0.5, 1.0, 2.0])
    result = measure_latency({"dense": dense, "fast": fast}, torch.zeros(8, 3, 2, 2), budget_s=0)
    assert result["dense"].median_s == 2.0
    assert result["dense"].images_per_s == 4.0
    assert result["dense"].speedup == 1.0
    assert result["dense"].q20_s == pytest.approx(1.4)
    assert result["dense"].q80_s == pytest.approx(2.6)
    assert result["fast"].speedup == 2.0
    assert result["fast"].speedup_q20 == pytest.approx(1.4)  # of 2, 3 and 1
    assert result["fast"].rounds_s == (0.5, 1.0, 2.0)


def test_models_take_turns_and_none_always_comes_first(calls: list[nn.Module]) -> None:
    models = {name: Named([1.0] * 3) for name in ("a", "b", "c")}
    spent: list[float] = []
    measure_latency(models, torch.zeros(1, 3, 2, 2), budget_s=0, on_time=spent.append)
    names = [next(name for name, model in models.items() if model is called) for called in calls]
    assert names == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert len(spent) == 3
    assert all(earlier <= later for earlier, later in pairwise(spent))


def test_a_real_forward_is_timed() -> None:
    result = measure_latency({"dense": nn.Conv2d(3, 8, 3)}, torch.zeros(2, 3, 32, 32), budget_s=0.05)["dense"]
    assert 0 < result.q20_s <= result.median_s <= result.q80_s
    assert len(result.rounds_s) >= 3


class Allocates(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        first = torch.zeros(1 << 18)  # 1 MiB
        second = first + 1  # 2 MiB
        del first
        third = torch.cat([second, second])  # 3 MiB
        del second
        return third + 1  # 4 MiB


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    peak = peak_memory(Allocates(), torch.zeros(1, 3, 2, 2))
    assert 4 * 2**20 <= peak < 4.1 * 2**20


def faults_again(folder: Path, *devices: str) -> int:
    """Page faults of taking 64 MiB for the thirtieth time, in a process of its own: the first ones grow the heap."""
    command = (sys.executable, "-c", FAULTS, *devices)
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout)


def test_freed_memory_is_kept_on_a_cpu(tmp_path: Path) -> None:
    assert faults_again(tmp_path, "cpu") < 100
    assert faults_again(tmp_path) > 100  # or nothing would have to be kept
    assert faults_again(tmp_path, "cuda:0") > 100
