"""AOTInductor packages, each compiled once for all tests: that takes 10 seconds and more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from host_models import make_host
from torch import nn

from tokenprune_ext.export import export_package
from tokenprune_ext.prune import apply

# What a program that classifies needs to know beside the model.
DETAILS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "crop_pct": 0.9}
DETAILS |= {"crop_mode": "center", "classes": "\n".join(f"thing {number}" for number in range(10))}
Packaged = Callable[[str, str], tuple[nn.Module, Path]]


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Host and method -> the pruned model and its package."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")

    @cache
    def package(host: str, method: str) -> tuple[nn.Module, Path]:
        model = apply(make_host(host, **({"depth": 3} if host == "vit" else {})), method, layers=[0, 1], keep=0.7)
        path = tmp_path_factory.mktemp("package") / f"{host}-{method}.pt2"
        return model, export_package(model, path, details=DETAILS)

    return package
