"""The executor that runs CUDA kernels on the host: right kernels give right results, and each mistake is found."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from ops import simt

pytestmark = pytest.mark.skipif(not simt.available, reason="no CUDA toolkit: CUDA kernels not run on the host")

RIGHT = (
    *("warp_calls", "block_calls", "exchange", "exchange_in_warp", "copies", "clusters"),
    *("mma_half", "mma_bfloat16", "mma_tf32"),
)

# Mistakes that both builds find, as a race or by a wrong result.
MISTAKES = {
    "divergent_barrier": r"\(warp 1, lane \d+\), at csrc/simt/selftest/executor.cpp:\d+: divergence: __syncthreads "
    r"here, but thread \d+ .* is in __syncthreads at csrc/simt/selftest/executor.cpp:\d+",
    "early_return": r"block \(0, 0, 0\): thread 0 \(warp 0, lane 0\) and 62 more: in __syncthreads at \S+:\d+; "
    r"thread 40 \(warp 1, lane 8\): returned",
    "absent_lane": "thread 0 .* and 15 more: in __shfl_xor_sync at .*; thread 16 .* and 15 more: in __syncthreads at ",
    "foreign_lane": r"executor.cpp:\d+: a shuffle reads lane 16, which does not take part",
    "unwritten_shared": "NaN from shared memory that nobody wrote",
    "copy_without_wait": r"race at .* writes at executor.cpp:\d+|wrong result: cp.async",
    "copy_without_barrier": r"race at .* writes at executor.cpp:\d+|wrong result: cp.async",
    "copy_forgotten": r"thread 0 \(warp 0, lane 0\): returned without waiting for its asynchronous copies",
    "exchange_without_barrier": "race at .* no barrier between|wrong result: exchange",
    "exchange_in_warp_without_barrier": "race at .* no barrier between|wrong result: exchange",
    "too_much_shared": "invalid argument",
    "clusters_before_hopper": "invalid configuration argument",
    "cluster_without_barrier": "race at .* no barrier between|wrong result: cluster_read",
    "cluster_returns_early": r"executor.cpp:\d+: threads of the block of rank 2 have returned|"
    r"thread \d+ .*: returned while others may read the block's shared memory, with no cluster_barrier between",
    "cluster_misses_barrier": r"and 191 more: in cluster_barrier at \S+executor.cpp:\d+; .* and 63 more: returned",
    "cluster_foreign_rank": "a cluster of 4 blocks has none of rank 4",
    "cluster_static_shared": "only the dynamic shared memory of a block is known to the cluster",
    "broken_attn_colsum": "race at .* no barrier between|wrong result: a column sum is -?nan",
}
RACES = {
    "blocks_write_one_place": r"block \d thread 0 .* writes at executor.cpp:\d+; block \d thread 0 .* writes at",
    "exchange_without_barrier": r"block 0 thread \d+ .* (reads|writes) at executor.cpp:\d+; block 0 thread",
    "cluster_without_barrier": r"block \d thread \d+ .* (reads|writes) at executor.cpp:\d+; block \d thread",
    "broken_attn_colsum": r"reads at common.cuh:\d+.* writes at attn_colsum.cuh:\d+|"
    r"writes at attn_colsum.cuh:\d+.* reads at common.cuh:\d+",
}
OUT_OF_BOUNDS = {
    "past_the_end": r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*csrc/simt/selftest/executor.cpp:\d+",
    "past_the_end_of_shared": r"use-after-poison(.|\n)*csrc/simt/selftest/executor.cpp:\d+",
    "past_the_end_of_dynamic_shared": r"use-after-poison(.|\n)*csrc/simt/selftest/executor.cpp:\d+",
    "broken_gather": r"heap-buffer-overflow(.|\n)*WRITE of size 16(.|\n)*copy_tokens(.|\n)*broken/gather.cuh:\d+",
}


def run(build: str, case: str, order: str) -> subprocess.CompletedProcess[str]:
    program = simt.build() / f"simt_selftest_{build}"
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}  # a failed launch keeps its stacks
    return subprocess.run([program, case, order], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("order", simt.ORDERS)
@pytest.mark.parametrize("build", ["races", "sanitized"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(case: str, build: str, order: str) -> None:
    result = run(build, case, order)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", simt.ORDERS)
@pytest.mark.parametrize(
    ("build", "case", "words"),
    [
        *(("races", case, words) for case, words in {**MISTAKES, **RACES}.items()),
        *(("sanitized", case, words) for case, words in {**MISTAKES, **OUT_OF_BOUNDS}.items()),
    ],
)
def test_mistakes_are_found(build: str, case: str, words: str, order: str) -> None:
    result = run(build, case, order)
    assert result.returncode != 0
    assert re.search(words, result.stderr), result.stderr


def test_unknown_names() -> None:
    assert run("races", "nothing", "forward").returncode == 2
    assert "order must be one of forward, reversed, random, got 'sideways'" in run("races", "copies", "sideways").stderr
