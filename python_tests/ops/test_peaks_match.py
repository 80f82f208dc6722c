from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend
from torch import Tensor

from tokenprune_ext import ops

CHANNELS = (1, 3, 8, 20, 80, 384)


def tokens_and_importance(batch: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Tokens, and importance in shuffled steps, which keeps products of it with anything else apart."""
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    steps = torch.rand(batch, tokens, generator=generator).argsort(1)
    return metric, (1 + steps.double()) / tokens


def similarities(metric: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    return (unit @ unit.mT).nan_to_num(-math.inf)


class TestPeaksMatch(OpMatrix):
    op = "peaks_match"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 64 else [1, 5] if tokens <= 257 else [5]:
                patches = tokens - prefix
                for keep in sorted({1, max(1, patches // 2), max(1, patches - 2), patches}):
                    simt = tokens <= 2 or (prefix == 5 and keep > 1 and (tokens == 17 or (tokens, keep) == (198, 96)))
                    given = tokens_and_importance(1 if tokens > 257 else 2, tokens, 20)
                    yield Sample(given, (keep, prefix, 1.0), f"N={tokens} p={prefix} keep={keep}", simt)
        for channels in CHANNELS:
            yield Sample(tokens_and_importance(2, 17, channels), (5, 1, 1.0), f"D={channels}")
        for batch in BATCHES:
            yield Sample(tokens_and_importance(batch, 17, 8), (5, 1, 1.0), f"B={batch}")
        for exponent in (0.5, 2.0, 3.7):
            yield Sample(tokens_and_importance(2, 40, 8), (12, 1, exponent), f"exponent={exponent}")
        metric, importance = tokens_and_importance(2, 90, 20)
        importance[:, 7:30:5], importance[:, 8:30:5] = math.nan, 0
        metric[:, 5:60:9, 3] = math.nan
        metric[:, 6:60:9, 3] = math.inf
        metric[:, 7:60:9] *= 1e-3
        for keep in (1, 30, 80):
            yield Sample((metric, importance), (keep, 2, 1.0), f"NaN and infinities, keep={keep}", keep == 30)
        nowhere = torch.full_like(metric, math.nan)
        yield Sample((nowhere, tokens_and_importance(2, 90, 1)[1]), (40, 2, 1.0), "all NaN")

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        return [dtype, torch.promote_types(dtype, torch.float32)]

    def small_sample(self) -> Sample:
        return Sample(tokens_and_importance(3, 9, 4), (3, 1, 2.0))

    def compare_integers(
        self, results: tuple[Tensor, ...], truths: tuple[Tensor, ...], args: tuple[Any, ...], name: str
    ) -> None:
        """Kept are the best scores and matches the most similar ones, or no further from them than rounding."""
        slack = 1e-5  # results do not tell the dtype of the sums: for float32
        cosine = similarities(args[0])
        for b in range(args[0].shape[0]):
            _, kept, dropped, match = (result[b].tolist() for result in results)
            assert sorted(kept + dropped) == [*range(args[3], args[0].shape[1])], name
            assert (kept, dropped) == (sorted(kept), sorted(dropped)), name
            worth = truths[0][b].nan_to_num(-math.inf)
            if dropped:
                assert worth[kept].min() >= worth[dropped].max() - slack * worth.abs()[kept].max(), name
            for i, j in zip(dropped, match, strict=True):
                best = cosine[b, i, kept].max()
                assert j == i if best == -math.inf else j in kept and cosine[b, i, j] >= best - slack, name

    def test_gradcheck(self, device: str) -> None:
        """There is no gradient to check: what chooses tokens does not ask for one."""
        args = self.arguments(self.small_sample(), Backend(device), torch.float64)
        args[0].requires_grad_()
        assert not any(result.requires_grad for result in ops.peaks_match(*args))


@each_backend
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_definition(backend: Backend, exponent: float) -> None:
    """Tokens in the plane, by their angles; the prefix, nearest to all and most important, takes no part."""
    angles = torch.tensor([[0.0, 0.0, 10.0, 90.0, 95.0, 180.0]]).deg2rad()
    metric = torch.stack([angles.cos(), angles.sin()], 2).to(backend.device)
    importance = torch.tensor([[9.0, 0.6, 0.5, 0.4, 0.3, 0.1]], device=backend.device)
    score, kept, dropped, match = backend.run("peaks_match", metric, importance, 2, 1, exponent)
    nearest = [-1.0, *(math.cos(math.radians(angle)) for angle in (10, 80, 5, 85))]  # of the more important ones
    expected = [0.0, *(i**exponent * (1 - c) for i, c in zip((0.6, 0.5, 0.4, 0.3, 0.1), nearest, strict=True))]
    torch.testing.assert_close(score[0].cpu(), torch.tensor(expected))
    assert (kept.tolist(), dropped.tolist(), match.tolist()) == ([[1, 3]], [[2, 4, 5]], [[1, 3, 3]])


def test_similarities_of_many_tokens_are_not_stored(device: str) -> None:
    """Beyond 1024 patch tokens the CPU searches twice: the same answers."""
    metric, importance = tokens_and_importance(1, 1030, 8)
    metric, importance = metric.float().to(device), importance.float().to(device)
    metric[0, 1024:] = math.nan  # these come last whatever happens, and are similar to nothing
    importance[0, 1024:] = -1.0
    few = ops.peaks_match(metric[:, :1024], importance[:, :1024], 300)
    score, kept, dropped, match = ops.peaks_match(metric, importance, 300)
    assert torch.equal(score[:, :1024], few[0])
    assert torch.equal(kept, few[1])
    assert torch.equal(dropped[:, :724], few[2])
    assert torch.equal(match[:, :724], few[3])
    assert torch.equal(match[:, 724:], dropped[:, 724:])


@each_backend
def test_equal_tokens_prefer_the_lower_position(backend: Backend) -> None:
    """One direction and one importance: the first is the peak, and everybody's match."""
    metric, importance = torch.ones(1, 40, 4, device=backend.device), torch.ones(1, 40, device=backend.device)
    score, kept, dropped, match = backend.run("peaks_match", metric, importance, 3, 1, 1.0)
    assert score[0, :2].tolist() == [0, 2]
    assert score[0, 2:].abs().max() < 1e-6
    assert kept.tolist() == [[1, 2, 3]]
    assert dropped.tolist() == [[*range(4, 40)]]
    assert (match == 1).all()


def test_same_bits_whatever_threads_share() -> None:
    """On the CPU, images or the places of one image."""
    metric, importance = tokens_and_importance(4, 150, 32)
    args = (metric.float(), importance.float(), 60, 1, 1.0)
    one = Backend("cpu").run("peaks_match", *args)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, Backend("cpu").run("peaks_match", *args), one))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    """On a few axes, where similarities and scores are exact: by the definition, one token after the other."""
    tokens = data.draw(st.integers(1, 40))
    prefix = data.draw(st.integers(0, tokens - 1))
    keep = data.draw(st.integers(1, tokens - prefix))
    axes = data.draw(st.lists(st.integers(0, 4), min_size=tokens, max_size=tokens))
    worth = data.draw(st.lists(st.integers(0, 8), min_size=tokens, max_size=tokens))
    metric = torch.nn.functional.one_hot(torch.tensor([axes]), 5).float()
    score, kept, dropped, match = ops.peaks_match(metric, torch.tensor([worth]).float(), keep, prefix)
    patches = range(prefix, tokens)
    expected = {}
    for i in patches:
        above = [float(axes[i] == axes[j]) for j in patches if (-worth[j], j) < (-worth[i], i)]
        expected[i] = worth[i] * (1 - max(above, default=-1.0))
    best = sorted(patches, key=lambda i: (-expected[i], i))
    assert score[0].tolist() == [0.0] * prefix + [expected[i] for i in patches]
    assert kept[0].tolist() == sorted(best[:keep])
    assert dropped[0].tolist() == sorted(best[keep:])
    nearest = [min(kept[0].tolist(), key=lambda j: (axes[j] != axes[i], j)) for i in dropped[0].tolist()]
    assert match[0].tolist() == nearest


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(metric=torch.rand(2, 6)), ValueError, r"metric must have shape \[B, N, D\], got \[2, 6\]"),
        (dict(metric=torch.rand(2, 6, 0)), ValueError, "at least one token and one channel"),
        (dict(importance=torch.rand(2, 5)), ValueError, r"importance must have shape \[2, 6\].*got \[2, 5\]"),
        (dict(importance=torch.ones(2, 6, dtype=torch.int64)), TypeError, "importance must have one of the dtypes"),
        (dict(importance=None), TypeError, "importance must be a torch.Tensor"),
        (dict(keep=6), ValueError, r"keep must be at most 5 \(the number of patch tokens\), got 6"),
        (dict(keep=0), ValueError, "keep must be at least 1, got 0"),
        (dict(num_prefix=7), ValueError, "num_prefix must be at most 6"),
        (dict(exponent=0.0), ValueError, "exponent must be positive and finite, got 0.0"),
        (dict(exponent=math.nan), ValueError, "exponent must be positive and finite, got nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(metric=torch.rand(2, 6, 4), importance=torch.rand(2, 6), keep=2, num_prefix=1)
    with pytest.raises(error, match=words):
        ops.peaks_match(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    metric, importance = torch.rand(2, 6, 4, device=device), torch.rand(2, 6, device=device)
    for args, words in (
        ((importance, 6, 1), r"keep must be in 1\.\.5, got 6"),
        ((importance[:, 1:], 2, 1), "importance must have shape"),
        ((importance.double(), 2, 1), "importance must be float32"),
        ((importance, 2, 1, -1.0), "exponent must be positive"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.peaks_match(metric, *args)
