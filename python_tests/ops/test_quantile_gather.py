from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops._check import accumulate_dtype


def tokens_and_scores(batch: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and whole scores that every dtype holds, many small and few large: sums are exact, ties are real."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    level = torch.randint(0, 9, (batch, tokens), generator=generator)
    return x, (2.0**level).double() - 1


def sample(scores: list[float], keep: int) -> list[bool]:
    """Which tokens are sampled, with fractions. ``scores`` are those of the patch tokens, and finite."""
    weights = [Fraction(score) if score > 0 else Fraction(0) for score in scores]
    sampled = [False] * len(scores)
    for k in range(1, keep + 1):
        wanted, so_far = Fraction(2 * k - 1, 2 * keep) * sum(weights), Fraction(0)
        for i, weight in enumerate(weights):
            so_far += weight
            if so_far >= wanted:
                sampled[i] = True
                break
    return sampled


class TestQuantileGather(OpMatrix):
    op = "quantile_gather"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 257 else [5]:
                patches = tokens - prefix
                for keep in sorted({1, max(1, patches // 2), max(1, patches - 1), patches}):
                    x, scores = tokens_and_scores(2, tokens, 20, tokens)
                    simt = tokens <= 17 or (tokens in (198, 257) and prefix in (0, 5)) or (tokens == 577 and keep > 1)
                    yield Sample((x, scores), (keep, prefix), f"N={tokens} p={prefix} keep={keep}", simt)
        for channels in (1, 3, 8, 192, 384):
            yield Sample(tokens_and_scores(2, 17, channels), (5, 1), f"C={channels}")
        for batch in BATCHES:
            yield Sample(tokens_and_scores(batch, 17, 8), (5, 1), f"B={batch}")
        x, scores = tokens_and_scores(3, 300, 8)
        yield Sample((x, torch.ones_like(scores)), (149, 2), "all alike: every quantile where a sum just reaches it")
        yield Sample((x, torch.zeros_like(scores)), (100, 2), "all 0")
        yield Sample((x, torch.full_like(scores, -1)), (100, 2), "all negative")
        yield Sample((x, torch.full_like(scores, math.nan)), (298, 2), "all NaN")
        alone = torch.zeros_like(scores)
        alone[:, 0], alone[:, 290] = 100, 1
        yield Sample((x, alone), (50, 2), "one token has everything, but for the prefix")
        special = scores.clone()
        special[:, 4:50:3] = -math.inf
        special[:, 5:50:3] = -3.0
        special[:, 6:60:3] = math.nan
        special[:, 60:70] = -0.0
        for keep in (1, 10, 150, 298):
            yield Sample((x, special), (keep, 2), f"NaN and negative, keep={keep}")
        special[1, 200:210:3] = math.inf
        yield Sample((x, special), (150, 2), "infinite")
        x = x.clone()
        x[:, 20, 3] = math.nan
        yield Sample((x, scores), (100, 2), "NaN in x")

    def small_sample(self) -> Sample:
        x, scores = tokens_and_scores(3, 9, 4)
        return Sample((x, scores), (5, 1))


@each_backend
def test_definition(backend: Backend) -> None:
    x = torch.arange(12.0).reshape(1, 6, 2).to(backend.device)
    scores = torch.tensor([[9.0, 1.0, 0.0, 6.0, 1.0, 0.0]], device=backend.device)
    tokens, index, sizes, log_sizes = backend.run("quantile_gather", x, scores, 4, 1)
    # Sums 1, 1, 7, 8, 8; quantiles 1, 3, 5 and 7: on tokens 1 and 3.
    assert index.tolist() == [[1, 2, 3, 4]]
    assert tokens.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]]
    assert sizes.tolist() == [[1, 1, 0, 1, 0]]
    assert log_sizes.tolist() == [[[[0, 0, -math.inf, 0, -math.inf]]]]
    assert backend.run("quantile_gather", x, scores, 1, 1)[1].tolist() == [[3]]
    assert backend.run("quantile_gather", x, scores, 2, 1)[1].tolist() == [[1, 3]]  # quantiles 2 and 6


@each_backend
def test_scores_without_a_share(backend: Backend) -> None:
    nan, inf = math.nan, math.inf

    def sampled(scores: list[float], keep: int) -> list[int]:
        x = torch.zeros(1, len(scores), 1, device=backend.device)
        _, index, sizes, _ = backend.run("quantile_gather", x, torch.tensor([scores], device=backend.device), keep)
        assert index.shape == (1, keep)
        return index[0][sizes[0] > 0].tolist()

    for scores in ([0.0] * 4, [-1.0, -inf, nan, -0.0], [nan] * 4):
        assert sampled(scores, 1) == sampled(scores, 4) == [0]
    assert sampled([nan, -5.0, 2.0, 0.0, -inf, 2.0, nan], 4) == [2, 5]
    assert sampled([1.0, 5.0, inf, 3.0, inf], 5) == [2]


@each_backend
def test_a_score_of_zero_is_never_sampled(backend: Backend) -> None:
    """However the sums are rounded: padding of one layer does not come back in the next."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 300, generator=generator, dtype=torch.float64).pow(20)
    scores[torch.rand(40, 300, generator=generator) < 0.5] = 0
    x = torch.zeros(40, 300, 1, dtype=torch.float64)
    x, scores = (part[:4] if backend.is_simt else part for part in (x.to(backend.device), scores.to(backend.device)))
    _, index, sizes, _ = backend.run("quantile_gather", x, scores, 298, 2)
    assert (scores.gather(1, index)[sizes[:, 2:] > 0] > 0).all()


@each_backend
def test_same_choice_as_the_reference_where_sums_are_rounded(backend: Backend) -> None:
    """Equal scores that no sum holds exactly, and a quantile for each: whatever is rounded is rounded alike."""
    for score in (0.1, 1 / 3, 1e-30):
        for tokens in (17, 197, 400):
            scores = torch.full((1, tokens), score, dtype=torch.float64)
            for keep in (tokens, tokens // 2, tokens // 3):
                expected = Backend("reference").run("quantile_gather", scores.unsqueeze(2), scores, keep)
                args = (scores.unsqueeze(2).to(backend.device), scores.to(backend.device), keep)
                for result, truth in zip(backend.run("quantile_gather", *args), expected, strict=True):
                    assert torch.equal(result.cpu(), truth)


@each_backend
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_may_have_their_own_dtype(backend: Backend, dtype: torch.dtype, score_dtype: torch.dtype) -> None:
    x, scores = (t.to(backend.device) for t in tokens_and_scores(2, 70, 5))
    x, scores = x.to(dtype), scores.to(score_dtype)
    results = backend.run("quantile_gather", x, scores, 20, 1)
    truths = Backend("reference").run("quantile_gather", x.cpu(), scores.double().cpu(), 20, 1)
    assert [result.dtype for result in results] == [dtype, torch.int64, accumulate_dtype(dtype), dtype]
    assert all(torch.equal(result.cpu(), truth) for result, truth in zip(results, truths, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_against_fractions(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 60))
    prefix = data.draw(st.integers(0, tokens - 1))
    keep = data.draw(st.integers(1, tokens - prefix))
    value = st.sampled_from([0.0, -1.0, 0.5, 1.0, 3.0, 1000.0, math.nan]) | st.integers(0, 2**20).map(float)
    scores = torch.tensor([data.draw(st.lists(value, min_size=tokens, max_size=tokens))])
    x = torch.arange(tokens, dtype=torch.float64).reshape(1, tokens, 1)
    out, index, sizes, log_sizes = ops.quantile_gather(x, scores, keep, prefix)
    sampled = sample(scores[0, prefix:].tolist(), keep)
    padding = [i for i, hit in enumerate(sampled) if not hit][: keep - sum(sampled)]
    chosen = sorted([i for i, hit in enumerate(sampled) if hit] + padding)
    assert index[0].tolist() == [prefix + i for i in chosen]
    assert out[0, :, 0].tolist() == [*range(prefix), *index[0].tolist()]
    assert sizes[0].tolist() == [1.0] * prefix + [float(sampled[i]) for i in chosen]
    assert torch.equal(log_sizes, sizes.log()[:, None, None])


def test_keeping_all_is_the_identity(device: str) -> None:
    x, scores = (t.to(device) for t in tokens_and_scores(3, 19, 6))
    tokens, index, sizes, _ = ops.quantile_gather(x, scores, 17, 2)
    assert torch.equal(tokens, x)
    assert torch.equal(index.cpu(), torch.arange(2, 19).expand(3, -1))
    assert sizes.sum() < 3 * 19  # and yet not all are sampled


def test_only_the_tokens_have_a_gradient(device: str) -> None:
    x, scores = (t.to(device).requires_grad_() for t in tokens_and_scores(2, 8, 3))
    tokens, index, sizes, log_sizes = ops.quantile_gather(x, scores, 4, 1)
    assert not any(part.requires_grad for part in (index, sizes, log_sizes))
    weight = torch.randn_like(tokens)
    tokens.backward(weight)
    assert scores.grad is None
    places = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
    expected = torch.zeros_like(x).scatter(1, places.unsqueeze(2).expand(-1, -1, 3), weight)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=torch.rand(2, 6)), ValueError, r"x must have shape \[B, N, C\], got \[2, 6\]"),
        (dict(x=torch.ones(2, 6, 4, dtype=torch.int8)), TypeError, "x must have one of the dtypes.*int8"),
        (dict(scores=torch.rand(3, 6)), ValueError, r"scores must have shape \[2, 6\].*got \[3, 6\]"),
        (dict(scores=torch.ones(2, 6, dtype=torch.int64)), TypeError, "scores must have one of the dtypes.*int64"),
        (dict(keep=0), ValueError, "keep must be at least 1, got 0"),
        (dict(keep=6), ValueError, r"keep must be at most 5 \(the number of patch tokens\), got 6"),
        (dict(keep=True), TypeError, "keep must be an int"),
        (dict(num_prefix=7), ValueError, "num_prefix must be at most 6"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(x=torch.rand(2, 6, 4), scores=torch.rand(2, 6), keep=3, num_prefix=1)
    with pytest.raises(error, match=words):
        ops.quantile_gather(**(good | arguments))  # type: ignore[arg-type]


def test_same_bits_however_threads_share_images() -> None:
    x, scores = (part.float() for part in tokens_and_scores(150, 300, 8))
    args = (x, scores.sqrt(), 250, 2)
    one = Backend("cpu").run("quantile_gather", *args)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, Backend("cpu").run("quantile_gather", *args), one))


def test_the_raw_operator_checks_too(device: str) -> None:
    x, scores = torch.rand(2, 6, 4, device=device), torch.rand(2, 6, device=device)
    with pytest.raises(RuntimeError, match=r"keep must be in 1\.\.5, got 6"):
        torch.ops.tokenprune.quantile_gather(x, scores, 6, 1)
    with pytest.raises(RuntimeError, match="scores must have shape"):
        torch.ops.tokenprune.quantile_gather(x, scores[:, :5], 3, 1)
