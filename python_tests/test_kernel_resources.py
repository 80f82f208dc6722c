"""The record of what kernels take at compile time: what is read from a log, and what is an error against a table."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "kernel_resources.py"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="no source tree"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt"),
]


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SUM = "_ZN10tokenprune3sum6kernelIfLb1EEEvPKfPf"  # tokenprune::sum::kernel<float, true>
SCAN = "_ZN10tokenprune12_GLOBAL__N_14scanIfLNS_4FuseE1EEEvPf"  # tokenprune::(anonymous namespace)::scan<...>


def built(name: str, arch: str, registers: int, *, shared: int = 0, spilled: int = 0) -> str:
    smem = f" {shared} bytes smem," if shared else ""
    return f"""
  ptxas info    : Compiling entry function '{name}' for '{arch}'
  ptxas info    : Function properties for {name}
      0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
  ptxas info    : Used {registers} registers, used 1 barriers,{smem} 432 bytes cmem[0]
  ptxas info    : Compile time = 33.839 ms"""


def build_log(*kernels: str, nvcc: str = "13.0.88") -> str:
    start = f"  -- The CUDA compiler identification is NVIDIA {nvcc} with host compiler GNU 12.2.0\n  [1/13] Building"
    return "\n".join([start, *kernels])


GOOD = (built(SUM, "sm_80", 40, shared=128), built(SUM, "sm_90", 32, shared=128), built(SCAN, "sm_80", 24))


@pytest.fixture
def run(resources: ModuleType, tmp_path: Path) -> Any:
    """Runs the command on a log, against the table of another."""
    table = tmp_path / "table.json"

    def run(log: str, recorded: str | None = None) -> Result:
        file = tmp_path / "build.log"
        options = []
        if recorded is not None:
            resources.write(table, resources.Record(resources.nvcc_version(recorded), resources.parse(recorded)))
            options = ["--check", str(table)]
        file.write_text(log)
        return CliRunner().invoke(resources.main, [str(file), *options])

    return run


def test_what_a_log_says(resources: ModuleType) -> None:
    assert resources.parse(build_log(*GOOD)) == [
        resources.Kernel("scan<float, (Fuse)1>", "sm_80", registers=24),
        resources.Kernel("sum::kernel<float, true>", "sm_80", registers=40, shared=128),
        resources.Kernel("sum::kernel<float, true>", "sm_90", registers=32, shared=128),
    ]
    assert resources.nvcc_version(build_log()) == "13.0.88"


def test_spills_of_called_functions_count(resources: ModuleType) -> None:
    called = "\n  Function properties for f\n  16 bytes stack frame, {} bytes spill stores, 0 bytes spill loads"
    log = built(SUM, "sm_80", 40, spilled=4) + called.format(8) + called.format(0)
    assert resources.parse(log) == [resources.Kernel("sum::kernel<float, true>", "sm_80", 40, stack=16, spilled=16)]


def test_a_kernel_of_two_files_counts_once_and_as_the_worse(resources: ModuleType) -> None:
    (kernel,) = resources.parse(build_log(built(SUM, "sm_80", 40), built(SUM, "sm_80", 32, spilled=2)))
    assert (kernel.registers, kernel.spilled) == (40, 4)


def test_a_written_table_is_read_back_and_has_a_kernel_a_line(resources: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    record = resources.Record("13.0.88", resources.parse(build_log(*GOOD)))
    resources.write(file, record)
    assert resources.read(file) == record
    lines = [line for line in file.read_text().splitlines() if "registers" in line]
    assert len(lines) == len(GOOD)
    assert json.loads(lines[0].rstrip(","))["kernel"] == "scan<float, (Fuse)1>"
    resources.write(file, replace(record, kernels=resources.parse(build_log(*reversed(GOOD)))))
    assert resources.read(file) == record


def test_a_build_as_recorded_passes(run: Any) -> None:
    result = run(build_log(*GOOD), build_log(*GOOD))
    assert result.exit_code == 0, result.output
    assert "built: 3 kernels, recorded: 3, differences: 0" in result.output


SPILLING = (built(SUM, "sm_80", 40, shared=128, spilled=8), *GOOD[1:])


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (None, "sum::kernel<float, true> on sm_80: spilled 16"),
        (build_log(*GOOD), "sum::kernel<float, true> on sm_80: spilled 0 -> 16"),
        (build_log(*SPILLING), "sum::kernel<float, true> on sm_80: spilled 16 -> 16"),
        (build_log(*GOOD, nvcc="12.8.93"), "sum::kernel<float, true> on sm_80: spilled 0 -> 16"),
        (build_log(*GOOD[1:], nvcc="12.8.93"), "on sm_80: not in the table, now registers 40, spilled 16"),
    ],
)
def test_a_spill_is_an_error(run: Any, recorded: str | None, words: str) -> None:
    result = run(build_log(*SPILLING), recorded)
    assert result.exit_code == 1
    assert words in result.output.partition("Not as it should be")[2]


CHANGES = [
    ((*GOOD, built(SCAN, "sm_90", 20)), "scan<float, (Fuse)1> on sm_90: not in the table, now registers 20"),
    (GOOD[:2], "scan<float, (Fuse)1> on sm_80: no longer built, was registers 24"),
    ((*GOOD[:2], built(SCAN, "sm_80", 33)), "scan<float, (Fuse)1> on sm_80: registers 24 -> 33"),
]


@pytest.mark.parametrize(("kernels", "words"), CHANGES)
def test_a_change_is_an_error(run: Any, kernels: tuple[str, ...], words: str) -> None:
    result = run(build_log(*kernels), build_log(*GOOD))
    assert result.exit_code == 1
    assert words in result.output.partition("Not as it should be")[2]


@pytest.mark.parametrize(("kernels", "words"), CHANGES)
def test_under_another_compiler_a_change_is_only_shown(run: Any, kernels: tuple[str, ...], words: str) -> None:
    result = run(build_log(*kernels, nvcc="13.1.0"), build_log(*GOOD))
    assert result.exit_code == 0, result.output
    assert "recorded with nvcc 13.0.88, built with nvcc 13.1.0: only spills are errors" in result.output
    assert words in result.output


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (built(SCAN, "sm_80", 32), "scan<float, (Fuse)1> on sm_80: registers 24 -> 32"),
        (built(SCAN, "sm_80", 12), "scan<float, (Fuse)1> on sm_80: registers 24 -> 12"),
        (built(SCAN, "sm_80", 24, shared=64), "scan<float, (Fuse)1> on sm_80: shared 0 -> 64"),
    ],
)
def test_other_differences_are_only_shown(run: Any, kernel: str, words: str) -> None:
    result = run(build_log(*GOOD[:2], kernel), build_log(*GOOD))
    assert result.exit_code == 0, result.output
    assert words in result.output


def test_a_log_without_kernels_is_an_error(run: Any) -> None:
    result = run("nothing was compiled")
    assert result.exit_code == 1
    assert "names no CUDA kernel" in result.output
