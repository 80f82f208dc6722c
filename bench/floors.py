"""What a device can do at best, measured: copying, and multiplying matrices. Floors of operators are made of it."""

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


@functools.cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """The rates of the device, with the threads and the precision (tf32 or not) that are set in torch."""
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
