"""The boundary to torch: what is loaded, what it depends on, and what is said when something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tokenprune_ext
from tokenprune_ext import info
from tokenprune_ext.ops import __all__ as operators

PACKAGE = Path(tokenprune_ext.__file__).parent
SOURCES = Path(__file__).resolve().parents[1] / "csrc"
CPU, CUDA = tokenprune_ext.LIBRARIES


def python(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that imports the given copy of the package."""
    setup = f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENPRUNE_REQUIRE_EXT": "", **environment},
    )


@pytest.fixture
def copy_without_libraries(tmp_path: Path) -> Path:
    package = tmp_path / "tokenprune_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return package


@pytest.mark.parametrize("name", operators)
def test_cpu_kernels_are_registered(name: str) -> None:
    assert info.has_kernel(name, "cpu"), f"no compiled CPU kernel of {name}: {CPU}"


@pytest.mark.skipif(not CUDA.path.exists(), reason="built without CUDA")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
@pytest.mark.parametrize("name", operators)
def test_cuda_kernels_are_registered(name: str) -> None:
    assert info.has_kernel(name, "cuda"), f"no compiled CUDA kernel of {name}: {CUDA}"


@pytest.mark.parametrize("library", tokenprune_ext.library_paths(), ids=lambda path: path.stem)
def test_libraries_use_the_stable_abi_alone(library: Path) -> None:
    """No C++ symbol of at::, c10:: or torch::, which change from version to version."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_" in symbols
    assert re.findall(r"\S*_ZNK?(?:2at|3c10|5torch)\S*", symbols) == []


@pytest.mark.skipif(not SOURCES.exists(), reason="no source tree")
def test_kernel_headers_include_no_torch() -> None:
    headers = [*SOURCES.glob("cuda/kernels/*.cuh"), *SOURCES.glob("ops/*_params.h")]
    assert len(headers) >= 8
    for header in headers:
        assert not re.search(r'#include *[<"].*(torch|ATen|c10|stable\.h)', header.read_text()), header


@pytest.mark.skipif(not SOURCES.exists(), reason="no source tree")
def test_kernels_are_the_same_on_the_host() -> None:
    """Only device.cuh knows that kernels are also run on the host; and none launches or shares memory past it."""
    for header in SOURCES.glob("cuda/kernels/*.cuh"):
        if header.name != "device.cuh":
            assert not re.search(r"^ *#if|__shared__|<<<|asm\b|__CUDA_ARCH__", header.read_text(), re.M), header


@pytest.mark.skipif(not SOURCES.exists(), reason="no source tree")
def test_every_operator_has_a_kernel_of_each_kind() -> None:
    for kind in ("cpu/*.cpp", "cuda/*.cu"):
        assert sorted(path.stem for path in SOURCES.glob(kind)) == sorted(operators)


def test_operators_exist_right_after_the_import() -> None:
    call = "torch.ops.tokenprune.wpr(torch.ones(1, 1, 2, 2) / 2)"
    result = python(f"import tokenprune_ext, torch; print({call}.tolist())")
    assert result.stdout.strip() == "[[[1.0, 1.0]]]", result.stderr


def test_operators_work_without_timm() -> None:
    result = python(
        """
        sys.modules["timm"] = None
        import tokenprune_ext, torch
        print(tokenprune_ext.ops.wpr(torch.ones(1, 1, 2, 2) / 2).shape)
        """
    )
    assert result.returncode == 0, result.stderr


def test_missing_libraries_warn_once_and_fall_back(copy_without_libraries: Path) -> None:
    result = python(
        """
        import tokenprune_ext, torch
        print(tokenprune_ext.__file__)
        print(tokenprune_ext.ops.wpr(torch.ones(1, 1, 2, 2) / 2).tolist())
        """,
        copy_without_libraries,
    )
    assert result.stdout.split() == [str(copy_without_libraries / "__init__.py"), "[[[1.0,", "1.0]]]"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert re.search(r"_C_cpu is not available \(not built; .*; running torch", result.stderr)


@pytest.mark.parametrize("demand", ["cpu", "cuda"])
def test_missing_libraries_are_an_error_when_demanded(copy_without_libraries: Path, demand: str) -> None:
    result = python("import tokenprune_ext", copy_without_libraries, TOKENPRUNE_REQUIRE_EXT=demand)
    assert result.returncode != 0
    assert f"ImportError: TOKENPRUNE_REQUIRE_EXT={demand}, but tokenprune: _C_cpu is not available" in result.stderr


def test_unknown_demand_is_an_error() -> None:
    result = python("import tokenprune_ext", TOKENPRUNE_REQUIRE_EXT="gpu")
    assert "TOKENPRUNE_REQUIRE_EXT must be cpu or cuda, got 'gpu'" in result.stderr


def test_a_library_that_cannot_load_is_named(copy_without_libraries: Path) -> None:
    (copy_without_libraries / "_C_cpu.so").write_bytes(b"not a library")
    result = python("import tokenprune_ext", copy_without_libraries)
    assert result.returncode == 0
    assert "_C_cpu is not available (failed to load:" in result.stderr


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        tokenprune_ext.prun  # noqa: B018
    assert set(tokenprune_ext.__all__) <= set(dir(tokenprune_ext))
    for name in tokenprune_ext.__all__:
        assert getattr(tokenprune_ext, name) is not None


def test_info_is_complete_and_plain() -> None:
    facts = json.loads(json.dumps(info.collect()))
    assert facts["libraries"]["_C_cpu"] == "loaded"
    assert set(facts["kernels"]) == set(operators)
    assert facts["build"]["torch_abi_target"] == "2.10"
    assert facts["build"]["version"] == facts["versions"]["tokenprune"]
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_native_module_reports_missing_devices() -> None:
    from tokenprune_ext import _native

    assert _native.device_count() == torch.cuda.device_count()
    with pytest.raises(ValueError, match=r"device must be in 0\.\.-?\d+, got 99"):
        _native.device_properties(99)
