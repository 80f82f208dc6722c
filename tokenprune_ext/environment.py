"""What a measured figure depends on besides its settings."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokenprune_ext.info import collect


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, time (UTC), versions and how the kernels were built, as plain values for JSON."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **collect(),
    }


def device_name(device: torch.device) -> str:
    """What the maker calls the GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
