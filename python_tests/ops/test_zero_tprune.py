from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend, queries_and_keys
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.bipartite_match import reference as bipartite_match
from tokenprune_ext.ops.head_aggregate import reference as head_aggregate
from tokenprune_ext.ops.wpr_qk import reference as wpr_qk

VMIN, VMAX = 0.01, 0.7
CLEAR = 3e-5  # by how much every choice has to be clear, on the mean-1 scale


def rough_scores(q: Tensor, k: Tensor, scale: float, class_start: bool, prefix: int) -> Tensor:
    start = torch.ones(q.shape[2], dtype=torch.float64)
    if class_start:
        start[0] = q.shape[2] ** 0.5
    return wpr_qk(q, k, scale, start, 1)[:, :, prefix:], head_aggregate(
        wpr_qk(q, k, scale, start, 1), VMIN, VMAX, prefix
    )


def gap(values: Tensor, place: int) -> float:
    """Between the ``place``-th largest value of each row and the next one, the smallest."""
    ranked = values.sort(-1, descending=True).values
    return math.inf if not 0 < place < values.shape[-1] else (ranked[..., place - 1] - ranked[..., place]).min().item()


def is_clear(q: Tensor, k: Tensor, metric: Tensor, scale: float, r: int, *options: Any) -> bool:
    """Whether no choice hangs on rounding: neither the halves, nor the pairs, nor which heads count."""
    if not len(q):
        return True
    class_start, iters, _, _, _, prefix, partition = options
    ranks, rough = rough_scores(q, k, scale, class_start, prefix)
    patches = rough.shape[1] - prefix
    important = patches // 2 if partition == "unimportant" else patches - patches // 2
    upper = rough[:, prefix:].argsort(1, descending=True)
    a, b = (upper[:, important:], upper[:, :important]) if partition == "unimportant" else upper.split(
        (important, patches - important), 1
    )  # fmt: skip
    rows = torch.nn.functional.normalize(metric.sum(1) if metric.dim() == 4 else metric, dim=-1)[:, prefix:]
    pairs = torch.stack([rows[i, a[i]] @ rows[i, b[i]].T for i in range(len(rows))])
    gaps = [gap(rough[:, prefix:], important)]
    if r:
        gaps += [gap(pairs, 1), gap(pairs.max(2).values, r)]
    kept = bipartite_match(metric, rough, r, prefix, partition)[2]
    for heads in (ranks, wpr_qk(q, k, scale, None, iters, 0.0, kept, prefix)[:, :, prefix:]):
        spread = heads.var(-1, correction=0) if heads.shape[-1] else heads.new_zeros(1)
        gaps += [(spread - bound).abs().min().item() for bound in (VMIN, VMAX)]
    return min(gaps) > CLEAR


@functools.cache
def inputs(
    batch: int, heads: int, tokens: int, channels: int, width: int, r: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a metric that every dtype holds exactly, with which no choice hangs on rounding."""
    for seed in range(1000):
        q, k = queries_and_keys(batch, heads, tokens, channels, seed)
        shape = (batch, heads, tokens, channels) if width == 0 else (batch, tokens, width)
        metric = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q, k, metric = ((part * 8).round() / 8 for part in (q, k, metric))
        if is_clear(q, k, metric, channels**-0.5, r, *options):
            return q, k, metric
    raise AssertionError("no such inputs")


def sample(
    batch: int, heads: int, tokens: int, channels: int, width: int, r: int, *options: Any, simt: bool = True
) -> Sample:
    name = f"B={batch} H={heads} N={tokens} d={channels} D={width} r={r} {options}"
    tensors = inputs(batch, heads, tokens, channels, width, r, *options)
    return Sample(tensors, (channels**-0.5, r, *options), name, simt)


def options(
    class_start: bool = True, iters: int = 4, prefix: int = 1, partition: str = "unimportant"
) -> tuple[Any, ...]:
    return class_start, iters, 0.0, VMIN, VMAX, prefix, partition


class TestZeroTPrune(OpMatrix):
    op = "zero_tprune"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 64 else [1]:
                patches = tokens - prefix
                most = (patches + 1) // 2 if patches > 1 else 0
                for r in sorted({0, min(5, most), most if tokens <= 64 else 0}):
                    given = options(prefix > 0, 3, prefix, "important" if prefix == 1 else "unimportant")
                    batch, heads = (2, 2) if tokens <= 257 else (1, 2)
                    simt = tokens <= 2 or tokens == 17
                    yield sample(batch, heads, tokens, 16, 0, r, *given, simt=simt)
        for channels in (1, 3, 20, 80):
            yield sample(2, 2, 17, channels, 20, 4, *options())
        for width in (3, 8, 40):
            yield sample(2, 2, 17, 16, width, 5, *options(), simt=width == 8)
        for batch in BATCHES:
            yield sample(batch, 3, 17, 16, 0, 4, *options())
        for iters in (0, 1, 30):
            yield sample(2, 3, 33, 16, 0, 8, *options(iters=iters), simt=iters == 1)

    def rounding(self, backend: Backend, dtype: torch.dtype, result_dtype: torch.dtype) -> float:
        """On chip, a GPU holds the probabilities of 16-bit inputs in float16."""
        on_chip = backend.name in ("cuda", "simt") and dtype.itemsize == 2
        return torch.finfo(torch.float16).eps if on_chip else super().rounding(backend, dtype, result_dtype)

    def small_sample(self) -> Sample:
        return sample(3, 2, 9, 8, 0, 2, *options())

    def test_gradcheck(self, device: str) -> None:
        """There is no gradient to check: what chooses tokens does not ask for one."""
        args = self.arguments(self.small_sample(), Backend(device), torch.float64)
        args[0].requires_grad_()
        assert not any(result.requires_grad for result in ops.zero_tprune(*args))


def stages(q: Tensor, k: Tensor, metric: Tensor, scale: float, r: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operators that the docstring names, one after the other."""
    class_start, iters, tol, vmin, vmax, prefix, partition = options

    def start(tokens: int) -> Tensor:
        return torch.tensor([tokens**0.5 if class_start else 1.0, *[1.0] * (tokens - 1)], dtype=torch.float32)

    tokens = q.shape[2]
    rough = ops.head_aggregate(ops.wpr_qk(q, k, scale, start(tokens), 1), vmin, vmax, prefix)
    dropped, match, kept = ops.bipartite_match(metric, rough, r, prefix, partition)
    left = ops.wpr_qk(q, k, scale, start(tokens - r), iters, tol, kept, prefix)
    scores = torch.full((len(q), tokens), -math.inf)
    scores[:, :prefix] = 0
    scores.scatter_(1, kept, ops.head_aggregate(left, vmin, vmax, prefix)[:, prefix:])
    return scores, dropped, match


def check_stages(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    results, expected = ops.zero_tprune(*args), stages(*args)
    torch.testing.assert_close(results[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(results[1], expected[1])
    assert torch.equal(results[2], expected[2])
    return results


@pytest.mark.parametrize("partition", ["unimportant", "important"])
@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (3, 2), (4, 2), (3, 1), (16, 3)])
def test_is_what_its_stages_are(batch: int, threads: int, partition: str) -> None:
    """Whether threads share images or the heads of one."""
    torch.set_num_threads(threads)
    given = options(partition=partition, prefix=2)
    q, k, metric = (part.float() for part in inputs(batch, 3, 50, 16, 24, 9, *given))
    check_stages(q, k, metric, 0.25, 9, *given)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_heads_stop_early_by_the_tokens_that_are_left(tol: float) -> None:
    class_start, iters, _, *rest = options(iters=30)
    q, k, metric = (part.float() for part in inputs(3, 3, 50, 16, 24, 24, *options(iters=30)))
    results = check_stages(q, k, metric, 0.25, 24, class_start, iters, tol, *rest)
    assert not torch.equal(results[0], ops.zero_tprune(q, k, metric, 0.25, 24, class_start, iters, 0.0, *rest)[0])


def test_what_does_not_fit_is_formed_twice() -> None:
    """Matrices of 720 tokens are the largest that are held; the answers are the same."""
    for tokens in (700, 740):
        q, k, metric = (part.float() for part in inputs(2, 2, tokens, 8, 0, 5, *options()))
        check_stages(q, k, metric, 8**-0.5, 5, *options())


# Matrices of many sizes, 23 to 31 MiB each, in a process that holds nothing else.
MANY_SIZES = """
import resource, torch
from tokenprune_ext import ops

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

def call(tokens):
    q = torch.rand(1, 16, tokens, 4)
    ops.zero_tprune(q, q, q, 0.5, 1, num_prefix=1)

torch.set_num_threads(1)
call(600)
before = resident()
for tokens in range(601, 700, 7):
    call(tokens)
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed")
def test_what_is_kept_for_later_calls_is_bounded(tmp_path: Path) -> None:
    """48 MiB of memory stay at most, of which the first call has 22; beside them, what malloc keeps."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = (sys.executable, "-c", MANY_SIZES)
    result = subprocess.run(command, cwd=tmp_path, env=usual, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 80


@each_backend
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_distances_are_never_rounded(backend: Backend, similarity: str) -> None:
    """Beside a large vector that all share, a distance is less than what tf32 leaves out. Queries and keys it holds."""
    given = options()
    q, k, metric = (part.float().to(backend.device) for part in inputs(1, 2, 40, 8, 24, 12, *given))
    exact, allowed = (
        backend.run("zero_tprune", q, k, metric + 300, 0.35, 12, *given, similarity, tf32)[1:] for tf32 in (False, True)
    )
    rounded = similarity == "cosine" and backend.name in ("cuda", "simt")
    assert all(map(torch.equal, exact, allowed)) != rounded


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["dropped", "kept"])
def test_values_that_are_not_finite(kind: str, value: float) -> None:
    """One in a token that is dropped has no effect on the others' scores; one in a kept token spoils its head."""
    given = (False, 3, 0.0, 0.0, math.inf, 1, "unimportant")
    q, k, metric = (part.float() for part in inputs(1, 3, 20, 8, 8, 6, *options(class_start=False)))
    _, dropped, match = ops.zero_tprune(q, k, metric, 0.3, 6, *given)
    token = (dropped if kind == "dropped" else match)[0, 0]
    # Neither the halves nor the pairs change: the head that is spoilt fails the filter.
    for part in (q, k):
        spoilt = part.clone()
        spoilt[0, 1, token, 0] = value
        args = (spoilt, k) if part is q else (q, spoilt)
        scores, _, _ = check_stages(*args, metric, 0.3, 6, *given)
        assert scores[0, 1:].nan_to_num(neginf=0).isfinite().all()


@pytest.mark.parametrize("sharpness", [10.0, 50.0, 75.0, 400.0])
def test_rows_of_which_nothing_is_left(sharpness: float) -> None:
    """Every token looks at one that is dropped, so much that the rest vanishes in float32 beside it: it is ranked
    among what is left all the same."""
    generator = torch.Generator().manual_seed(0)
    tokens, channels, half = 24, 8, 12
    q, k = (torch.randn(2, 2, tokens, channels, generator=generator) for _ in range(2))
    q[..., 0], k[..., 0], k[..., 7, 0] = 1.0, 0.0, sharpness
    metric = torch.randn(2, tokens, 8, generator=generator)
    # All of the more important half go, and that token is the most important one.
    scores, dropped, _ = check_stages(q, k, metric, 1.0, half, False, 2, 0.0, 0.0, math.inf, 1, "important")
    assert (dropped == 7).any(1).all()
    assert torch.equal(scores.isneginf().sum(1), torch.full((2,), half))
    assert scores[~scores.isneginf()].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    """Any shapes and options: the results are positions, and scores as many as the docstring says."""
    prefix = data.draw(st.integers(0, 3))
    patches = data.draw(st.integers(1, 30))
    r = data.draw(st.integers(0, (patches + 1) // 2 if patches > 1 else 0))
    batch, heads, channels = (data.draw(st.integers(1, most)) for most in (3, 3, 20))
    partition = data.draw(st.sampled_from(["unimportant", "important"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    q, k, metric = (torch.randn(batch, heads, prefix + patches, channels, generator=generator) for _ in range(3))
    iters = data.draw(st.integers(0, 5))
    scores, dropped, match = ops.zero_tprune(
        q, k, metric, 0.5, r, prefix > 0, iters, 0.0, VMIN, VMAX, prefix, partition
    )  # fmt: skip
    assert (scores[:, :prefix] == 0).all()
    assert (dropped.diff(dim=1) > 0).all()
    for i in range(batch):
        gone = set(dropped[i].tolist())
        assert gone == {j for j, score in enumerate(scores[i].tolist()) if score == -math.inf}
        assert gone <= set(range(prefix, prefix + patches))
        assert not gone & set(match[i].tolist())
        assert set(match[i].tolist()) <= set(range(prefix, prefix + patches))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(k=torch.rand(2, 3, 6, 5)), ValueError, "k must have the shape of q"),
        (
            dict(metric=torch.rand(2, 5, 4)),
            ValueError,
            r"metric must have the batch and the tokens of q \[2, 3, 6, 4\]",
        ),
        (dict(metric=None), TypeError, "metric must be a torch.Tensor"),
        (dict(r=4), ValueError, "r must be at most 3 .*of 5 patch tokens.*got 4"),
        (dict(r=-1), ValueError, "r must be at least 0, got -1"),
        (dict(r=True), TypeError, "r must be an int, got True"),
        (dict(num_prefix=6), ValueError, "num_prefix must be at most 5"),
        (dict(num_prefix=0, class_start=True), ValueError, "class_start needs a class token"),
        (dict(max_iters=-1), ValueError, "max_iters must be at least 0, got -1"),
        (dict(tol=math.nan), ValueError, "tol must be at least 0, got nan"),
        (dict(vmin=1.0), ValueError, "vmin must not be above vmax, got vmin=1.0 and vmax=0.7"),
        (dict(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (dict(partition="alternate"), ValueError, "partition must be one of.*unimportant.*got 'alternate'"),
        (dict(similarity="l1"), ValueError, "similarity must be one of.*got 'l1'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    q = torch.rand(2, 3, 6, 4)
    good = dict(q=q, k=q, metric=q, scale=0.5, r=2, num_prefix=1)
    with pytest.raises(error, match=words):
        ops.zero_tprune(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    q = torch.rand(2, 3, 6, 4, device=device)
    for args, words in (
        ((q[:, :, 1:], 0.5, 2), "metric must have the batch and the tokens of q"),
        ((q, 0.5, 5), r"r must be in 0\.\.3, got 5"),
        ((q, 0.5, 2, True), "class_start needs a class token"),
        ((q, 0.5, 2, False, -1), "max_iters must be at least 0"),
        ((q, 0.5, 2, False, 3, -1.0), "tol must be at least 0"),
        ((q, 0.5, 2, False, 3, 0.0, 1.0, 0.5), "vmin must not be above vmax"),
        ((q, 0.5, 0, False, 3, 0.0, 0.0, 0.5, 6), "num_prefix must be in"),
        ((q, 0.5, 2, False, 3, 0.0, 0.0, 0.5, 1, "alternate"), "partition must be one of unimportant, important"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.zero_tprune(q, q, *args)
