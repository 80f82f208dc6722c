"""What is installed, built, loaded and registered."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from . import LIBRARIES, __version__
from ._loader import build_info, native
from .ops import __all__ as operators

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def has_kernel(operator: str, device: str) -> bool:
    """Whether a compiled kernel (not the plain-torch reference) serves ``operator`` on ``device``, cpu or cuda."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenprune::{operator}", DISPATCH_KEYS[device])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _gpus() -> list[dict[str, Any]]:
    module = native()
    return [module.device_properties(i) for i in range(module.device_count())] if module else []


def collect() -> dict[str, Any]:
    """Everything a bug report needs.

    Returns:
        A dict that JSON can hold: ``versions``, ``build`` (how the kernels were built), ``libraries`` (loaded, or why
        not), ``kernels`` (for each operator and device: compiled or reference), ``cuda`` (of the kernels, torch and the
        driver) and ``gpus``.
    """
    module = native()
    cuda = module.cuda_versions() if module else {}
    return {
        "versions": {
            "tokenprune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": _version("timm"),
            "platform": platform.platform(),
        },
        "build": build_info(),
        "libraries": {
            library.name: "loaded" if library.loaded else f"not available: {library.problem}" for library in LIBRARIES
        },
        "kernels": {
            name: {device: "compiled" if has_kernel(name, device) else "reference" for device in DISPATCH_KEYS}
            for name in operators
        },
        "cuda": {
            "kernels": _cuda_version(cuda.get("runtime", 0)),
            "torch": torch.version.cuda,
            "driver": _cuda_version(cuda.get("driver", 0)),
        },
        "gpus": _gpus(),
    }
