from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops import simt
from ops.matrix import BATCHES, TOKENS, Backend, OpMatrix, Sample, each_backend, on_host, queries_and_keys, sizes
from ops.test_wpr import class_start, iterate

from tokenprune_ext import ops
from tokenprune_ext.launches import record_launches

CHANNELS = (1, 8, 20, 32, 64, 72, 80, 96, 128)


class TestWprQk(OpMatrix):
    """Tensors of a sample: q, k and start; options: scale, max_iters, tol."""

    op = "wpr_qk"

    def samples(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(0)  # one start in twenty is off by more after 30 iterations
        for tokens in TOKENS:
            q, k = queries_and_keys(*sizes(tokens), tokens, 64, tokens)
            each = torch.rand(q.shape[:3], dtype=torch.float64, generator=generator) + 0.5
            for start in (None, class_start(tokens), each) if tokens <= 257 else (None,):
                for iters in (0, 1, 5, 30) if tokens <= 257 else (1, 2):
                    shape = "none" if start is None else list(start.shape)
                    name = f"N={tokens} start={shape} iters={iters}"
                    simt = tokens <= 2 or (tokens == 17 and iters < 30 and start is each)
                    yield Sample((q, k, start), (0.125, iters, 0.0), name, simt)
        for tokens, channels in ((197, 64), (290, 8)):  # a matrix on chip, and one formed again, for the host too
            yield Sample((*queries_and_keys(1, 1, tokens, channels), None), (0.125, 2, 0.0), f"B=1 H=1 N={tokens}")
        q, k = queries_and_keys(1, 1, 3700, 8)  # more than a CPU holds
        yield Sample((q, k, None), (0.35, 3, 0.0), "N=3700", simt=False)
        for channels in CHANNELS:
            q, k = queries_and_keys(1, 2, 70, channels)
            yield Sample((q, k, None), (channels**-0.5, 2, 0.0), f"d={channels}", channels in (1, 20, 72))
        for batch in BATCHES:
            yield Sample((*queries_and_keys(batch, 2, 17, 8), None), (0.5, 3, 0.0), f"B={batch}")
        q, k = queries_and_keys(2, 2, 17, 8)
        k[1, 0, 3, 4] = float("nan")
        yield Sample((q, k, None), (0.5, 3, 0.0), "NaN in k")

    def small_sample(self) -> Sample:
        q, k = queries_and_keys(3, 2, 9, 4)
        return Sample((q, k, torch.rand(3, 2, 9, dtype=torch.float64) + 0.5), (0.5, 4, 0.0))

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        return [dtype, dtype, torch.float64 if dtype == torch.float64 else torch.float32]

    def arguments(self, sample: Sample, backend: Backend, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, start, scale, *options = super().arguments(sample, backend, dtype)
        return (q, k, scale, start, *options)

    def rounding(self, backend: Backend, dtype: torch.dtype, result_dtype: torch.dtype) -> float:
        """On chip, a GPU holds the probabilities of 16-bit inputs in float16."""
        on_chip = backend.name in ("cuda", "simt") and dtype.itemsize == 2
        return torch.finfo(torch.float16).eps if on_chip else super().rounding(backend, dtype, result_dtype)


@each_backend
@pytest.mark.parametrize("tokens", [17, 197, 800])
def test_every_head_stops_on_its_own(backend: Backend, tokens: int) -> None:
    """Heads that mix fast stop early, slow ones go on: on chip, and formed again in every iteration."""
    if backend.is_simt and tokens > 17:
        pytest.skip("takes long on the host; the samples have both paths")
    tol = 1e-3
    sharpness = torch.tensor([0.0, 0.5, 2.0, 6.0], dtype=torch.float64)[:, None, None]
    q, k = queries_and_keys(1, 4, tokens, 16, tokens)
    q = q * sharpness
    (result,) = backend.run("wpr_qk", *(t.to(backend.device) for t in (q, k)), 0.25, None, 40, tol)
    attn = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
    stops = set()
    for head in range(4):
        expected, iterations = iterate(attn[0, head], torch.ones(tokens, dtype=torch.float64), 40, tol)
        stops.add(iterations)
        torch.testing.assert_close(result[0, head].cpu(), expected, rtol=1e-10, atol=1e-10)
    assert len(stops) >= 3, f"the heads were meant to stop at different iterations, got {stops}"


@pytest.mark.parametrize(
    ("backend", "tokens", "dtype", "blocks"),
    [
        on_host("sm_90", 341, torch.float16, 2),
        on_host("sm_90", 260, torch.float64, 4),
        on_host("sm_90", 900, torch.float16, 0),
        on_host("sm_90, 4 multiprocessors", 800, torch.float16, 0),
        on_host("sm_90, PTX of sm_80", 341, torch.float16, 0),
    ],
)
def test_the_blocks_of_a_cluster_hold_a_matrix(backend: Backend, tokens: int, dtype: torch.dtype, blocks: int) -> None:
    """Each block forms its rows, which do not divide evenly. What more than eight blocks hold is formed again, and so
    it is where the device is too small for the cluster, or its code does not know of any."""
    q, k = (t.to(dtype) for t in queries_and_keys(1, 2, tokens, 8, tokens))
    simt.configure(backend.architecture)
    with record_launches(execute=False, library=simt.path()) as found:
        simt.call("wpr_qk", q, k, 0.3, None, 1, 0.0)
    resident = [launch.grid for launch in found if "resident_kernel" in launch.kernel]
    assert resident == [(2 * blocks, 1, 1)] * (blocks > 0)
    if blocks == 0:
        return
    start = class_start(tokens).to(torch.promote_types(dtype, torch.float32))
    (result,) = backend.run("wpr_qk", q, k, 0.3, start, 4, 0.0)
    attn = (q.double() @ k.double().transpose(-2, -1) * 0.3).softmax(-1)
    expected = torch.stack([iterate(attn[0, head], class_start(tokens), 4, 0.0)[0] for head in range(2)])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3  # the probabilities are held in float16
    torch.testing.assert_close(result[0].double(), expected, rtol=tolerance, atol=tolerance)


@each_backend
def test_tf32_changes_float32_on_tensor_cores_alone(backend: Backend) -> None:
    """Factors lose 13 bits: seen in the result, and no more than that. Other dtypes and backends ignore it."""
    q, k = (t.to(backend.device) for t in queries_and_keys(1, 2, 70, 64))
    truth = backend.run("wpr_qk", q, k, 0.125, None, 2, 0.0)[0]
    for dtype in (torch.float32, torch.bfloat16):
        exact, allowed = (
            backend.run("wpr_qk", q.to(dtype), k.to(dtype), 0.125, None, 2, 0.0, None, 0, tf32)[0]
            for tf32 in (False, True)
        )
        rounded = dtype == torch.float32 and backend.name in ("cuda", "simt")
        assert torch.equal(exact, allowed) != rounded
        if rounded:
            torch.testing.assert_close(allowed.double(), truth, rtol=3e-3, atol=3e-3)


@each_backend
def test_views_of_packed_qkv(backend: Backend) -> None:
    packed = torch.randn(2, 19, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(backend.device)
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    (result,) = backend.run("wpr_qk", q, k, 0.25, None, 3, 0.0)
    (expected,) = backend.run("wpr_qk", q.contiguous(), k.contiguous(), 0.25, None, 3, 0.0)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(k=torch.rand(2, 3, 5, 8)), ValueError, r"k must have the shape of q, \[2, 3, 4, 8\], got \[2, 3, 5, 8\]"),
        (dict(scale=float("inf")), ValueError, "scale must be finite, got inf"),
        (dict(start=torch.ones(5)), ValueError, r"start must have shape \[4\] or \[2, 3, 4\] to go with q.*\[5\]"),
        (dict(start=[1.0] * 4), TypeError, "start must be a torch.Tensor"),
        (dict(max_iters=-1), ValueError, "max_iters must be at least 0, got -1"),
        (dict(tol=-1e-3), ValueError, "tol must be at least 0, got -0.001"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(q=torch.rand(2, 3, 4, 8), k=torch.rand(2, 3, 4, 8), scale=0.3)
    with pytest.raises(error, match=words):
        ops.wpr_qk(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    q = torch.rand(1, 1, 2, 4, device=device)
    with pytest.raises(RuntimeError, match="max_iters must be at least 0"):
        torch.ops.tokenprune.wpr_qk(q, q, 1.0, None, -1)
    with pytest.raises(RuntimeError, match="start must be float32"):
        torch.ops.tokenprune.wpr_qk(q, q, 1.0, torch.ones(2, device=device).double())
