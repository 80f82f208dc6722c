"""Occupancy on paper, and the plan of all launches that is made with it."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from ops import simt

from tokenprune_ext.launches import record_launches
from tokenprune_ext.ops import __all__ as operators

needs_toolkit = pytest.mark.skipif(not simt.available, reason="no CUDA toolkit")


@pytest.fixture(scope="module")
def occupancy(bench: Path) -> ModuleType:
    return importlib.import_module("occupancy")


@pytest.fixture(scope="module")
def plan(bench: Path) -> ModuleType:
    return importlib.import_module("launch_plan")


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 256, 32, 0, 8),  # all 2048 threads
        ("sm_87", 256, 32, 0, 6),  # all 1536 threads
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_87", 32, 16, 0, 16),
        ("sm_80", 256, 48, 0, 5),  # registers: ten warps in a quarter of them
        ("sm_80", 1024, 64, 0, 1),
        ("sm_80", 1024, 65, 0, 0),
        ("sm_80", 512, 32, 80 * 1024, 2),  # shared memory, and 1 KiB of it that CUDA takes
        ("sm_80", 512, 32, 163 * 1024, 1),
        ("sm_80", 512, 32, 163 * 1024 + 1, 0),
        ("sm_87", 512, 32, 163 * 1024, 1),
        ("sm_90", 512, 32, 113 * 1024, 2),
        ("sm_90", 512, 32, 227 * 1024, 1),
        ("sm_90", 512, 32, 227 * 1024 + 1, 0),
        ("sm_90", 1056, 8, 0, 0),
    ],
)
def test_blocks_of_a_multiprocessor(
    occupancy: ModuleType, arch: str, threads: int, registers: int, shared: int, blocks: int
) -> None:
    assert occupancy.blocks_per_sm(occupancy.ARCHITECTURES[arch], threads, registers, shared) == blocks


# The calculator that comes with the toolkit needs no device.
CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  cudaOccDeviceProp device;
  cudaOccFuncAttributes kernel;
  int threads;
  while (std::scanf("%d %d %d %zu %d %d %zu", &device.computeMajor, &device.computeMinor,
                    &device.maxThreadsPerMultiprocessor, &device.sharedMemPerMultiprocessor, &threads, &kernel.numRegs,
                    &kernel.maxDynamicSharedSizeBytes) == 7) {
    device.maxThreadsPerBlock = kernel.maxThreadsPerBlock = 1024;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
    device.numSms = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                kernel.maxDynamicSharedSizeBytes) != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_toolkit
def test_the_calculator_of_cuda_agrees(occupancy: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "calculator.cpp"
    source.write_text(CALCULATOR)
    subprocess.run([shutil.which("nvcc"), "-o", tmp_path / "calculator", source], check=True, capture_output=True)
    shared = (0, 1, 1024, 2048, 9000, 18432, 33 * 1024, 48 * 1024, 56000, 95666, 163 * 1024, 200_000, 227 * 1024)
    points = list(itertools.product(simt.ARCHITECTURES, range(32, 1025, 32), range(8, 256, 4), shared))
    lines = []
    for arch, *rest in points:
        limits = occupancy.ARCHITECTURES[arch]
        lines.append(" ".join(map(str, (arch[3], arch[4], limits.threads_per_sm, limits.shared_per_sm, *rest))))
    said = subprocess.run([tmp_path / "calculator"], input="\n".join(lines), text=True, capture_output=True, check=True)
    expected = [int(line) for line in said.stdout.split()]
    assert len(expected) == len(points)
    for (arch, *rest), blocks in zip(points, expected, strict=True):
        assert occupancy.blocks_per_sm(occupancy.ARCHITECTURES[arch], *rest) == blocks, (arch, *rest)


@pytest.mark.simt
@needs_toolkit
@pytest.mark.parametrize("arch", simt.ARCHITECTURES)
def test_every_kernel_of_every_operator_is_known(plan: ModuleType, arch: str) -> None:
    calls = importlib.import_module("operator_calls")
    simt.configure(arch)
    for dtype in calls.DTYPES:
        for op, args in calls.operator_calls("cpu", dtype).items():
            with record_launches(execute=False, library=simt.path()) as found:
                simt.call(op, *args)
            assert found, op
            for launch in found:
                assert (launch.kernel, arch) in plan.resources(), op
                assert launch.num_sms == plan.ARCHITECTURES[arch].num_sms


@pytest.mark.simt
@needs_toolkit
@pytest.mark.parametrize("op", operators)
def test_each_benchmark_has_a_plan(plan: ModuleType, op: str) -> None:
    records = list(plan.records(next(plan.cases(op))))
    assert [arch for arch, _ in itertools.groupby(record["arch"] for record in records)] == list(simt.ARCHITECTURES)
    for record in records:
        assert record["blocks_per_sm"] >= 1
        assert 0 < record["tail"] <= 1
        assert record["source"] == "on paper, from data sheets, not measured"


@pytest.mark.simt
@needs_toolkit
def test_a_plan(plan: ModuleType) -> None:
    """A large matrix, of which no memory is there: two launches, then two for each of five iterations."""
    shape = {"B": 256, "H": 12, "N": 4096, "D": 64, "iters": 5}
    case = next(case for case in plan.cases("wpr_qk") if case.shape == shape)
    records = [record for record in plan.records(case) if record["arch"] == "sm_90"]
    assert [record["times"] for record in records] == [1, 1, 5, 5]
    last = records[-1]
    assert last["kernel"] == "wpr_qk::advance_kernel<float>"
    assert (last["grid"], last["threads"]) == ((256 * 12, 1, 1), 256)
    assert last["blocks_per_sm"] == plan.blocks_per_sm(
        plan.ARCHITECTURES["sm_90"], 256, last["registers"], last["static_shared"]
    )
    assert last["waves"] == pytest.approx(256 * 12 / (132 * last["blocks_per_sm"]), abs=1e-4)
    flops = (4 * 64 + 2 * 5) * 256 * 12 * 4096**2
    assert last["floor_s"] == pytest.approx({"H100 SXM": flops / 989e12, "H200 SXM": flops / 989e12}, rel=1e-3)


@pytest.mark.simt
@needs_toolkit
def test_what_no_device_holds_is_left_out(plan: ModuleType) -> None:
    *_, largest = plan.cases("wpr")
    assert largest.bytes_moved > 80e9
    assert [(record["arch"], list(record["floor_s"])) for record in plan.records(largest)] == [("sm_90", ["H200 SXM"])]


@needs_toolkit
def test_both_kinds_of_shared_memory_count(plan: ModuleType) -> None:
    kernel = "attn_colsum::kernel<__half, float, true>"
    static = plan.resources()[kernel, "sm_80"].shared
    for dynamic, blocks in ((163 * 1024 - static, 1), (163 * 1024 - static + 1, 0)):
        launch = plan.Launch(kernel, (1, 1, 1), 256, 0, 0, dynamic, 0, 108)
        assert plan._on_paper(launch, "sm_80").blocks_per_sm == blocks


@pytest.mark.simt
@needs_toolkit
def test_command(plan: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(plan.main, ["--op", "head_aggregate", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "on paper, from data sheets, not measured" in result.output
    (file,) = tmp_path.iterdir()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    batches = {(record["arch"], record["B"]) for record in records}
    assert batches == set(itertools.product(simt.ARCHITECTURES, (1, 8, 64, 256)))
    # Scores in, [B, H, N], and out, [B, N].
    first = records[0]
    bytes_moved = first["B"] * (first["H"] + 1) * first["N"] * torch.float32.itemsize
    assert first["floor_s"] == pytest.approx({"A100 SXM 80 GB": bytes_moved / 2.039e12}, rel=1e-3)
