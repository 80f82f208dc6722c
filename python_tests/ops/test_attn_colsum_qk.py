from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.matrix import (
    BATCHES,
    PREFIXES,
    TOKENS,
    Backend,
    OpMatrix,
    Sample,
    each_backend,
    queries_and_keys,
    sizes,
)
from torch import Tensor

from tokenprune_ext import ops

REDUCE = ("mean", "max", "sum")
ROWS = ("all", "patch", "cls")
CHANNELS = (1, 8, 20, 32, 64, 72, 80, 96, 128)


def row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).logsumexp(-1)


class TestAttnColsumQk(OpMatrix):
    """Tensors of a sample: q, k and lse; options: scale, head_reduce, query_rows, num_prefix."""

    op = "attn_colsum_qk"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            q, k = queries_and_keys(*sizes(tokens), tokens, 64, tokens)
            lse = row_lse(q, k, 0.125)
            prefixes = [p for p in PREFIXES if p <= tokens] if tokens <= 64 else [5]
            for reduce, rows, prefix in itertools.product(REDUCE, ROWS if tokens <= 257 else ["patch"], prefixes):
                if rows == "cls" and prefix == 0:
                    continue
                for given in (None, lse) if prefix in (1, 5) else (None,):
                    name = f"N={tokens} {reduce} {rows} p={prefix} lse={given is not None}"
                    simt = tokens <= 2 or (tokens == 17 and prefix == 1 and (given is None or reduce == "max"))
                    yield Sample((q, k, given), (0.125, reduce, rows, prefix), name, simt)
        for tokens, reduce in ((70, "mean"), (130, "max")):  # several tiles, for the host too
            q, k = queries_and_keys(1, 2, tokens, 64)
            yield Sample((q, k, None), (0.125, reduce, "patch", 1), f"B=1 H=2 N={tokens} {reduce}")
        for channels in CHANNELS:
            q, k = queries_and_keys(1, 2, 70, channels)
            simt = channels in (1, 20, 72)
            yield Sample((q, k, None), (channels**-0.5, "max", "patch", 1), f"d={channels}", simt)
        for batch in BATCHES:
            yield Sample((*queries_and_keys(batch, 1, 17, 8), None), (0.5, "max", "patch", 1), f"B={batch} H=1")
        for value, reduce in itertools.product((float("nan"), float("inf"), float("-inf")), REDUCE):
            q, k = queries_and_keys(2, 3, 17, 8)
            k[1, 1, 3, 4] = value
            yield Sample((q.abs(), k, None), (0.5, reduce, "patch", 1), f"{value} in k {reduce}")
        q, k = queries_and_keys(1, 2, 33, 16)
        for scale in (0.0, -0.25, 20.0):
            yield Sample((q, k, None), (scale, "max", "all", 0), f"scale={scale}")

    def small_sample(self) -> Sample:
        q, k = queries_and_keys(3, 2, 7, 8)
        return Sample((q, k, row_lse(q, k, 0.3)), (0.3, "max", "patch", 2))

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        return [dtype, dtype, torch.float64 if dtype == torch.float64 else torch.float32]

    def arguments(self, sample: Sample, backend: Backend, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, lse, *options = super().arguments(sample, backend, dtype)
        return (q, k, *options, lse)


@each_backend
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduce", REDUCE)
def test_equals_the_sum_over_the_matrix(backend: Backend, reduce: str, rows: str) -> None:
    q, k = (t.to(backend.device) for t in queries_and_keys(2, 3, 41, 16))
    attn = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
    (result,) = backend.run("attn_colsum_qk", q, k, 0.25, reduce, rows, 2)
    torch.testing.assert_close(result, Backend("reference").run("attn_colsum", attn, reduce, rows, 2)[0])


@each_backend
def test_tf32_changes_float32_on_tensor_cores_alone(backend: Backend) -> None:
    """Factors lose 13 bits: seen in the result, and no more than that. Other dtypes and backends ignore it."""
    q, k = (t.to(backend.device) for t in queries_and_keys(1, 2, 70, 64))
    truth = backend.run("attn_colsum_qk", q, k, 0.125, "max", "patch", 1, None)[0]
    for dtype in (torch.float32, torch.bfloat16):
        exact, allowed = (
            backend.run("attn_colsum_qk", q.to(dtype), k.to(dtype), 0.125, "max", "patch", 1, None, tf32)[0]
            for tf32 in (False, True)
        )
        rounded = dtype == torch.float32 and backend.name in ("cuda", "simt")
        assert torch.equal(exact, allowed) != rounded
        if rounded:
            torch.testing.assert_close(allowed.double(), truth, rtol=3e-3, atol=3e-3)


@each_backend
def test_views_of_packed_qkv(backend: Backend) -> None:
    """Queries and keys as a block has them: views of one tensor [B, N, 3, H, d]."""
    packed = torch.randn(2, 19, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(backend.device)
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    (result,) = backend.run("attn_colsum_qk", q, k, 0.25, "max", "patch", 1)
    (expected,) = backend.run("attn_colsum_qk", q.contiguous(), k.contiguous(), 0.25, "max", "patch", 1)
    assert torch.equal(result, expected)


def test_a_wrong_lse_overflows(device: str) -> None:
    """Terms beyond the largest float are infinite, as the reference's are, and tiny ones are zero."""
    q, k = (torch.randn(1, 2, 9, 16, device=device) for _ in range(2))
    for shift, expected in ((-500.0, math.inf), (-100.0, math.inf), (500.0, 0.0)):
        found = ops.attn_colsum_qk(q, k, 0.25, lse=row_lse(q, k, 0.25) + shift)
        assert (found == expected).all(), shift


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("rows", ROWS)
def test_gradients(device: str, reduce: str, rows: str) -> None:
    q, k = (t.to(device).requires_grad_() for t in queries_and_keys(2, 3, 5, 4))
    assert torch.autograd.gradcheck(lambda a, b: ops.attn_colsum_qk(a, b, 0.5, reduce, rows, 1), (q, k))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(q=torch.rand(2, 3, 4)), ValueError, r"q must have shape \[B, H, N, d\], got \[2, 3, 4\]"),
        (dict(k=torch.rand(2, 3, 5, 8)), ValueError, r"k must have the shape of q, \[2, 3, 4, 8\], got \[2, 3, 5, 8\]"),
        (
            dict(k=torch.rand(2, 3, 4, 8).half()),
            TypeError,
            "k must have the dtype of q, torch.float32, got torch.float16",
        ),
        (dict(q=torch.ones(2, 3, 4, 8, dtype=torch.int64)), TypeError, "q must have one of the dtypes.*int64"),
        (dict(q=torch.rand(2, 0, 4, 8), k=torch.rand(2, 0, 4, 8)), ValueError, "at least one head"),
        (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (dict(head_reduce="median"), ValueError, "head_reduce must be one of mean, max, sum, got 'median'"),
        (dict(query_rows="class"), ValueError, "query_rows must be one of all, patch, cls, got 'class'"),
        (dict(num_prefix=5), ValueError, r"num_prefix must be at most 4 \(the number of tokens\), got 5"),
        (dict(query_rows="cls", num_prefix=0), ValueError, "needs a class token"),
        (dict(lse=torch.rand(2, 3, 5)), ValueError, r"lse must have shape \[2, 3, 4\].*got \[2, 3, 5\]"),
        (dict(lse=1.0), TypeError, "lse must be a torch.Tensor"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(q=torch.rand(2, 3, 4, 8), k=torch.rand(2, 3, 4, 8), scale=0.3)
    with pytest.raises(error, match=words):
        ops.attn_colsum_qk(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    q = torch.rand(1, 2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="head_reduce must be one of"):
        torch.ops.tokenprune.attn_colsum_qk(q, q, 1.0, "median")
    with pytest.raises(RuntimeError, match="k must have the shape of q"):
        torch.ops.tokenprune.attn_colsum_qk(q, q[..., :3], 1.0)
