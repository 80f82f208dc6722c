"""The library that defines the operators for programs without Python, and what it does beside Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenprune_ext
from tokenprune_ext.ops import __all__ as operators

PACKAGE = Path(tokenprune_ext.__file__).parent
LIBRARIES = tokenprune_ext.library_paths()
LOAD = "\n".join(["import torch", *(f"torch.ops.load_library({str(path)!r})" for path in LIBRARIES[:2])])
CALL = "print(torch.ops.tokenprune.wpr(torch.ones(1, 1, 2, 2) / 2).tolist())"


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, which finds the package that this one has."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


def test_the_libraries_of_a_program_without_python() -> None:
    names = [path.name for path in LIBRARIES]
    assert names[:2] == ["_C_schemas.so", "_C_cpu.so"]
    assert names[2:] in ([], ["_C_cuda.so"])


def test_schemas_are_those_of_python(tmp_path: Path) -> None:
    find = "schemas = {s.name: str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith('tokenprune::')}"
    result = python(f"{LOAD}\n{find}\nimport json; print(json.dumps(schemas))", tmp_path)
    assert result.returncode == 0, result.stderr
    ours = {f"tokenprune::{name}": str(getattr(torch.ops.tokenprune, name).default._schema) for name in operators}
    assert json.loads(result.stdout) == ours


def test_kernels_run_without_the_package(tmp_path: Path) -> None:
    result = python(f"{LOAD}\n{CALL}\nimport sys; assert 'tokenprune_ext' not in sys.modules", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[[1.0, 1.0]]]"


def test_beside_python_it_is_harmless_and_says_so(tmp_path: Path) -> None:
    result = python(f"import tokenprune_ext\n{LOAD}\n{CALL}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[[1.0, 1.0]]]"
    assert "_C_schemas.so defines nothing: the operators are defined already" in result.stderr


def test_the_package_behind_it_is_an_error_that_names_it(tmp_path: Path) -> None:
    result = python(f"{LOAD}\nimport tokenprune_ext", tmp_path)
    assert result.returncode != 0
    assert "csrc/schemas/schemas.cpp" in result.stderr


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_no_library_needs_python(library: Path) -> None:
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in needed
    assert "libtorch_python" not in needed
