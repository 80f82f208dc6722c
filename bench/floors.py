"""What a device can do at best: copying, and multiplying matrices. Floors of operators are made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenprune_ext.latency import time_in_turns

COPY_BYTES = 2**28  # more than any cache holds
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of square matrices, enough to keep the device busy
BUDGET_S = 0.2


@dataclass(frozen=True)
class Rates:
    """Bytes read and written, and operations of a matrix product, a second."""

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, bytes_moved: int, flops: int) -> float:
        """No operator that moves and computes so much takes less time."""
        return max(bytes_moved / self.bytes_per_s, flops / self.flop_per_s)


@dataclass(frozen=True)
class DataSheet:
    """What a data sheet promises, not measured: memory, its bandwidth, dense bfloat16 products on tensor cores."""

    arch: str
    memory_bytes: float
    rates: Rates


DATA_SHEETS = {
    "A100 SXM 80 GB": DataSheet("sm_80", 80e9, Rates(2.039e12, 312e12)),
    "Jetson AGX Orin 64 GB": DataSheet("sm_87", 64e9, Rates(204.8e9, 170e12 / 4)),  # 170 sparse int8 TOPS
    "H100 SXM": DataSheet("sm_90", 80e9, Rates(3.35e12, 989e12)),
    "H200 SXM": DataSheet("sm_90", 141e9, Rates(4.8e12, 989e12)),
}


@functools.cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """The measured rates of the device, with the threads and the precision (tf32 or not) that are set in torch."""
    return Rates(2 * COPY_BYTES / _copy_s(device), 2 * MATRIX[device] ** 3 / _product_s(device, dtype))


def _copy_s(device: str) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device)


def _product_s(device: str, dtype: torch.dtype) -> float:
    factor = torch.randn(MATRIX[device], MATRIX[device], device=device).to(dtype)
    return _fastest(lambda: factor @ factor, device)


def _fastest(call: Callable[[], object], device: str) -> float:
    """The shortest time: a floor must not be raised by whatever else was running."""
    return min(time_in_turns({"": call}, cuda=device == "cuda", budget_s=BUDGET_S)[""])
