"""The CUDA kernels on the host: builds ``csrc/simt``, loads it and runs operators through it.

``TOKENPRUNE_SIMT=sanitized`` takes the build under AddressSanitizer and UndefinedBehaviorSanitizer, which needs their
run time to be loaded first (``.ci/sanitize`` shows how); the default, ``races``, finds accesses that no barrier orders.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"
ARCHITECTURES = ("sm_80", "sm_87", "sm_90")
ORDERS = ("forward", "reversed", "random")
NAMESPACE = "tokenprune_simt"
VARIANT = os.environ.get("TOKENPRUNE_SIMT", "races")

available = shutil.which("nvcc") is not None


@functools.cache
def build_error() -> str:
    """Build what has changed, once a process; what went wrong, or nothing."""
    options = ["-DTOKENPRUNE_SIMT=1", f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "LD_PRELOAD": ""}  # compilers do not want the sanitizers' run time
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):  # processes of pytest-xdist share the folder
        for command in (["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], ["cmake", "--build", BUILD]):
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            if result.returncode != 0:
                return f"{result.stdout}\n{result.stderr}"
    return ""


def build() -> Path:
    """The folder with the libraries and programs."""
    assert not build_error(), f"the host build of the CUDA kernels failed:\n{build_error()}"
    return BUILD


def path() -> Path:
    """The library with the kernels."""
    return BUILD / f"_C_simt_{VARIANT}.so"


@functools.cache
def library() -> ctypes.CDLL:
    build()
    torch.ops.load_library(path())
    return ctypes.CDLL(str(path()))


def configure(architecture: str, order: str = ORDERS[0], seed: int = 0) -> None:
    """From now on the host is such a device, and runs its threads in this order."""
    assert library().tokenprune_simt_configure(architecture.encode(), order.encode(), seed) == 0


@functools.cache
def _define(op: str) -> torch.library.Library:
    """The operator's schema under the namespace of the host kernels; kept, because it goes when the object goes."""
    schema = str(getattr(torch.ops.tokenprune, op).default._schema)
    namespace = torch.library.Library(NAMESPACE, "FRAGMENT")
    namespace.define(schema.partition("::")[2])
    return namespace


def call(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The operator's CUDA kernels on the device and in the order that are configured."""
    library()
    _define(op)
    result = getattr(getattr(torch.ops, NAMESPACE), op)(*args)
    return result if isinstance(result, tuple) else (result,)


def run(op: str, architecture: str, *args: Any) -> tuple[Tensor, ...]:
    """The operator's CUDA kernels on a simulated device. The order of the threads must not show in the result."""
    orders = ORDERS if VARIANT == "races" else ORDERS[-1:]  # an index is out of bounds in any order
    results = []
    for order in orders:
        configure(architecture, order, len(results))
        results.append(call(op, *args))
    for order, other in zip(orders, results, strict=True):
        for first, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(
                same, first, rtol=0, atol=0, equal_nan=True, msg=lambda m, o=order: f"{op}, threads {o}: {m}"
            )
    return results[0]
