from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import simt
from ops.matrix import BATCHES, TOKENS, Backend, OpMatrix, Sample, attention, each_backend, on_host, sizes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.launches import record_launches


def class_start(tokens: int) -> Tensor:
    start = torch.ones(tokens, dtype=torch.float64)
    start[0] = tokens**0.5
    return start


class TestWpr(OpMatrix):
    op = "wpr"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            attn = attention(*sizes(tokens), tokens)
            each = torch.rand(attn.shape[:3], dtype=torch.float64) + 0.5
            starts = (None, class_start(tokens), each)
            for start in starts if tokens <= 577 else starts[1:2]:
                for iters in (0, 1, 5, 30) if tokens <= 257 else (5,):
                    shape = "none" if start is None else list(start.shape)
                    name = f"N={tokens} start={shape} iters={iters}"
                    simt = tokens <= 17 or (tokens in (64, 197, 257) and iters == 1 and start is each)
                    yield Sample((attn, start), (iters, 0.0), name, simt)
        for batch in BATCHES:
            yield Sample((attention(batch, 2, 17), None), (3, 0.0), f"B={batch}")
        for value in (float("nan"), float("inf")):
            attn = attention(2, 2, 17)
            attn[1, 0, 3, 4] = value
            yield Sample((attn, None), (3, 0.0), f"{value} in attn")

    def small_sample(self) -> Sample:
        return Sample((attention(3, 2, 9), torch.rand(3, 2, 9, dtype=torch.float64) + 0.5), (4, 0.0))

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        return [dtype, torch.float64 if dtype == torch.float64 else torch.float32]


def iterate(attn: Tensor, s: Tensor, max_iters: int, tol: float) -> tuple[Tensor, int]:
    """One head, written out: the scores, and after how many iterations they were reached."""
    for iteration in range(1, max_iters + 1):
        before, s = s, s @ attn
        if (s - before).abs().sum().item() <= tol * len(s):
            return s, iteration
    return s, max_iters


@each_backend
@pytest.mark.parametrize("tokens", [17, 197])
def test_every_head_stops_on_its_own(backend: Backend, tokens: int) -> None:
    """Heads that mix fast stop early, slow ones go on: each equals its own sequence at its own last iteration."""
    tol = 1e-3
    sharpness = torch.tensor([0.0, 0.5, 2.0, 8.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(2, 4, tokens, tokens, generator=generator, dtype=torch.float64)
    attn = (logits * sharpness[:, None, None]).softmax(-1)
    (result,) = backend.run("wpr", attn.to(backend.device), class_start(tokens).to(backend.device), 50, tol)
    stops = set()
    for image in range(2):
        for head in range(4):
            expected, iterations = iterate(attn[image, head], class_start(tokens), 50, tol)
            stops.add(iterations)
            torch.testing.assert_close(result[image, head].cpu(), expected, rtol=1e-12, atol=1e-12)
    assert len(stops) >= 3, f"the heads were meant to stop at different iterations, got {stops}"


@pytest.mark.parametrize(
    ("backend", "tokens", "dtype", "blocks"),
    [
        on_host("sm_90", 263, torch.float32, 2),
        on_host("sm_90", 300, torch.float64, 4),
        on_host("sm_90", 400, torch.float64, 8),
        on_host("sm_90", 560, torch.float64, 0),
        on_host("sm_90, 4 multiprocessors", 300, torch.float64, 4),
        on_host("sm_90, 4 multiprocessors", 400, torch.float64, 0),
        on_host("sm_90, PTX of sm_80", 263, torch.float32, 0),
    ],
)
def test_the_blocks_of_a_cluster_hold_a_matrix(backend: Backend, tokens: int, dtype: torch.dtype, blocks: int) -> None:
    """Rows that do not divide evenly, heads that stop on their own. What more than eight blocks hold is read again, and
    so it is where the device is too small for the cluster, or its code does not know of any."""
    sharpness = torch.tensor([0.5, 8.0], dtype=torch.float64)[:, None, None]
    generator = torch.Generator().manual_seed(tokens)
    attn = (torch.randn(1, 2, tokens, tokens, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)
    simt.configure(backend.architecture)
    with record_launches(execute=False, library=simt.path()) as found:
        simt.call("wpr", attn.to(dtype), None, 1, 0.0)
    assert [launch.grid for launch in found] == [(2 * max(blocks, 1), 1, 1)]
    if blocks == 0:
        return
    (result,) = backend.run("wpr", attn.to(dtype), class_start(tokens).to(dtype), 5, 1e-2)
    expected = [iterate(attn[0, head], class_start(tokens), 5, 1e-2) for head in range(2)]
    assert [iterations for _, iterations in expected] == [3, 5]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        result[0].double(), torch.stack([s for s, _ in expected]), rtol=tolerance, atol=tolerance
    )


@each_backend
def test_large_tolerance_stops_after_one_step(backend: Backend) -> None:
    attn = attention(1, 2, 33).to(backend.device)
    (one,) = backend.run("wpr", attn, None, 1, 0.0)
    (stopped,) = backend.run("wpr", attn, None, 30, 10.0)
    (full,) = backend.run("wpr", attn, None, 30, 0.0)
    assert torch.equal(stopped, one)
    assert not torch.equal(full, one)


@each_backend
def test_gradient_respects_the_stop(backend: Backend) -> None:
    attn = attention(1, 1, 7).to(backend.device).requires_grad_()
    ops.wpr(attn, max_iters=30, tol=10.0)[..., 2].sum().backward()
    (stopped,) = (attn.grad.clone(),)
    attn.grad = None
    ops.wpr(attn, max_iters=1, tol=0.0)[..., 2].sum().backward()
    torch.testing.assert_close(stopped, attn.grad)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**16))
def test_mass_is_conserved_and_tokens_can_be_renumbered(tokens: int, heads: int, iters: int, seed: int) -> None:
    attn = attention(2, heads, tokens, seed)
    scores = ops.wpr(attn, max_iters=iters, tol=0.0)
    torch.testing.assert_close(scores.sum(-1), torch.full((2, heads), float(tokens), dtype=torch.float64))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    shuffled = ops.wpr(attn[:, :, order][..., order], max_iters=iters, tol=0.0)
    torch.testing.assert_close(shuffled, scores[..., order])


def test_uniform_attention_is_a_fixed_point() -> None:
    scores = ops.wpr(torch.full((1, 1, 8, 8), 1 / 8))
    assert torch.equal(scores, torch.ones(1, 1, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(attn=torch.rand(2, 3, 4, 5)), ValueError, r"attn must .*equal last dimensions.*\[2, 3, 4, 5\]"),
        (dict(attn=torch.rand(3, 4, 4)), ValueError, r"attn must have shape \[B, H, N, N\], got \[3, 4, 4\]"),
        (dict(attn=torch.rand(2, 0, 4, 4)), ValueError, "at least one head"),
        (dict(attn=torch.rand(2, 3, 0, 0)), ValueError, "one token"),
        (dict(attn=torch.ones(1, 1, 2, 2, dtype=torch.int64)), TypeError, "attn must have one of the dtypes.*int64"),
        (dict(attn=[1.0]), TypeError, "attn must be a torch.Tensor.*list"),
        (dict(start=torch.ones(5)), ValueError, r"start must have shape \[4\] or \[2, 3, 4\].*\[5\]"),
        (dict(start=torch.ones(1, 3, 4)), ValueError, "start must have shape"),
        (dict(start=[1.0] * 4), TypeError, "start must be a torch.Tensor"),
        (dict(max_iters=-1), ValueError, "max_iters must be at least 0, got -1"),
        (dict(max_iters=2.5), TypeError, "max_iters must be an int"),
        (dict(tol=-1e-3), ValueError, "tol must be at least 0, got -0.001"),
        (dict(tol=float("nan")), ValueError, "tol must be at least 0, got nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(attn=torch.rand(2, 3, 4, 4))
    with pytest.raises(error, match=words):
        ops.wpr(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    with pytest.raises(RuntimeError, match="max_iters must be at least 0"):
        torch.ops.tokenprune.wpr(torch.rand(1, 1, 2, 2, device=device), None, -1)
    with pytest.raises(RuntimeError, match="start must be float32"):
        torch.ops.tokenprune.wpr(torch.rand(1, 1, 2, 2, device=device), torch.ones(2, device=device).double())


def test_start_of_any_dtype_is_taken() -> None:
    attn = attention(1, 1, 5).float()
    assert torch.equal(ops.wpr(attn, torch.ones(5, dtype=torch.int64)), ops.wpr(attn))
