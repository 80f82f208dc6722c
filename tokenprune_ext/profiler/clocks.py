"""The state of the device's clocks, where it can be read without rights: latency means little without it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "persistence_mode", "power.limit", "pstate")
_CPU = {
    "governor": "cpu0/cpufreq/scaling_governor",
    "current_khz": "cpu0/cpufreq/scaling_cur_freq",
    "max_khz": "cpu0/cpufreq/scaling_max_freq",
    "boost": "cpufreq/boost",
}


def clock_state(device: torch.device) -> dict[str, str]:
    """What `nvidia-smi`, on Jetson `nvpmodel`, or Linux says of the clocks, the driver too; empty when nothing does."""
    if device.type != "cuda":
        return _cpu_state(Path("/sys/devices/system/cpu"))
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # nvidia-smi counts GPUs that torch may not see
    said = _say("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader")
    values = [value.strip() for value in said.split(",")]
    if len(values) == len(_FIELDS):
        return dict(zip(_FIELDS, values, strict=True))
    said = _say("nvpmodel", "-q").strip()
    return {"nvpmodel": said} if said else {}


def _cpu_state(root: Path) -> dict[str, str]:
    found = {name: root / path for name, path in _CPU.items()}
    return {name: path.read_text("utf-8").strip() for name, path in found.items() if path.is_file()}


def _say(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
