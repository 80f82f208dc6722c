"""A device that one can reckon with: 2 multiprocessors of 1e8 operations a second, and bandwidths that cost nothing."""

from __future__ import annotations

from typing import Any

from tokenprune_ext.profiler.device import AttentionTile, Device, Tile


def tiny_device(**changes: Any) -> Device:
    fields: dict[str, Any] = {
        "name": "tiny",
        "num_sms": 2,
        "clock_hz": 1e6,
        "registers_per_sm": 65536,
        "shared_per_sm": 65536,
        "threads_per_sm": 2048,
        "flop_per_clock": {"float16": 100, "float32": 50},
        "memory_bytes_per_s": 1e30,
        "l2_bytes": 10**9,
        "l2_bytes_per_clock": 1e30,
        "kernel_s": 1e-30,
        "gemm_tiles": (Tile(4, 8, 2),),
        "attention_tile": AttentionTile(4, 8, 1),
    }
    return Device(**{**fields, **changes})
