"""A pruned model goes wherever the dense one goes: every path with every method, and with every family of models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deploy_paths import CASES, LONG_CASES, PATHS, ROOT, build_cpp, compiled, cpp, pruned


@pytest.mark.parametrize(("host", "method"), CASES)
@pytest.mark.parametrize("path", PATHS)
def test_path(path, host, method, tmp_path):
    PATHS[path](pruned(host, method), tmp_path)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if not (ROOT / "examples").exists():
        pytest.skip("no source tree")
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    return build_cpp(tmp_path_factory.mktemp("classify"))


@pytest.mark.parametrize(("host", "method"), LONG_CASES)
def test_compiled(host, method, tmp_path):
    compiled(pruned(host, method), tmp_path)


@pytest.mark.parametrize(("host", "method"), LONG_CASES)
def test_cpp(host, method, program, tmp_path):
    cpp(pruned(host, method), tmp_path, program)
