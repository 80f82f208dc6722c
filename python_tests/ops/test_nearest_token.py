from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend, reference
from torch import Tensor

from tokenprune_ext import ops

CHANNELS = (1, 3, 8, 20, 64, 80, 128, 384)
SIMILARITIES = ("cosine", "dot", "euclidean")
RANKS = ("importance", "two groups", "levels", "equal")


def tokens_and_rank(batch: int, tokens: int, channels: int, kind: str = "importance") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    importance = torch.rand(batch, tokens, generator=generator).argsort(1)
    levels = {"importance": tokens, "two groups": 2, "levels": 5, "equal": 1}
    return metric, importance % levels[kind] - 2


def all_pairs(metric: Tensor, similarity: str = "cosine") -> Tensor:
    """By the definitions, in float64."""
    rows = metric.double()
    if similarity == "euclidean":
        return -torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    if similarity == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows @ rows.mT


def similarities(metric: Tensor, rank: Tensor, num_prefix: int, similarity: str = "cosine") -> Tensor:
    """Of every token (rows) and its candidates (columns), in float64; minus infinity for all others."""
    pairs = all_pairs(metric, similarity)
    candidate = (rank[:, None, :] < rank[:, :, None]) & pairs.isfinite()
    candidate[:, :num_prefix] = candidate[:, :, :num_prefix] = False
    return torch.where(candidate, pairs, -math.inf)


class TestNearestToken(OpMatrix):
    op = "nearest_token"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 198 else [5]:
                for kind in RANKS if tokens <= 257 else ("importance",):
                    name = f"N={tokens} p={prefix} {kind}"
                    large = (tokens, prefix, kind) in ((64, 0, "levels"), (198, 5, "importance"))
                    simt = tokens <= 2 or (tokens == 17 and prefix in (0, 5)) or large
                    yield Sample(tokens_and_rank(2 - tokens // 577, tokens, 20, kind), (prefix,), name, simt)
        for channels in CHANNELS:
            yield Sample(tokens_and_rank(2, 17, channels), (1,), f"D={channels}")
            yield Sample(tokens_and_rank(1, 130, channels), (1,), f"N=130 D={channels}", channels == 80)
        for channels in (65, 127, 129, 260):  # around what is staged at a time
            yield Sample(tokens_and_rank(1, 33, channels), (1,), f"D={channels}")
        for batch in BATCHES:
            yield Sample(tokens_and_rank(batch, 17, 8), (1,), f"B={batch}")
        yield Sample(tokens_and_rank(2, 5, 8), (5,), "nothing but prefix")
        metric, rank = tokens_and_rank(1, 90, 20)
        metric[:, 4:60:9] = 0
        metric[:, 5:60:9, 3] = math.nan
        metric[:, 6:60:9, 3] = math.inf
        metric[:, 7:60:9] *= 1e-3
        yield Sample((metric, rank), (2,), "zeros, NaN and infinities")
        yield Sample((torch.full_like(metric, math.nan), rank), (2,), "all NaN")
        yield Sample((torch.zeros_like(metric), rank), (2,), "all zeros")
        big = torch.tensor([-(2**63), 2**63 - 1, 2**32, 2**32 + 1, 0])
        yield Sample((metric, big[rank % 5]), (2,), "ranks beyond 32 bits")

    def small_sample(self) -> Sample:
        return Sample(tokens_and_rank(3, 9, 4), (1,))

    def compare_integers(
        self, results: tuple[Tensor, ...], truths: tuple[Tensor, ...], args: tuple[Any, ...], name: str
    ) -> None:
        """The chosen candidate is the best one, or no further from it than the rounding of the sums."""
        chosen, truth = results[1], truths[1]
        squares = args[0].square().sum(-1)
        scale = 1.0 if len(args) < 4 else squares[squares.isfinite()].max().item() if squares.isfinite().any() else 0.0
        assert torch.equal(chosen < 0, truth < 0), name
        at = similarities(*args).gather(2, chosen.clamp_min(0).unsqueeze(2)).squeeze(2)
        slack = 16 * torch.finfo(results[0].dtype).eps * scale
        assert (at >= truths[0] - slack)[chosen >= 0].all(), name
        assert (chosen == -1)[chosen < 0].all(), name


class TestNearestTokenByProduct(TestNearestToken):
    similarity = "dot"

    def samples(self) -> Iterator[Sample]:
        """Every kind of input once: what the similarity changes is not the shape."""
        for sample in super().samples():
            tokens = sample.tensors[0].shape[1]  # type: ignore[union-attr]
            if (sample.simt and tokens <= 198) or tokens == 577:
                yield Sample(sample.tensors, (*sample.options, self.similarity), sample.name, sample.simt)

    def small_sample(self) -> Sample:
        sample = super().small_sample()
        return Sample(sample.tensors, (*sample.options, self.similarity))


class TestNearestTokenByDistance(TestNearestTokenByProduct):
    similarity = "euclidean"


@each_backend
def test_other_similarities_choose_by_length_and_by_place(backend: Backend) -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.0, 9.0], [2.0, 2.0], [3.0, 1.0]]], device=backend.device)
    rank = torch.tensor([[0, 0, 0, 1]], device=backend.device)
    for similarity, value, index in (("cosine", 0.9**0.5, 0), ("dot", 9.0, 1), ("euclidean", -1.0, 2)):
        results = backend.run("nearest_token", metric, rank, 0, similarity)
        assert results[1][0, 3] == index
        assert results[0][0, 3].item() == pytest.approx(value)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_near_neighbours_far_from_the_origin(backend: Backend, dtype: torch.dtype) -> None:
    """Distances are the rounding of the squared norms apart, at most: sums are float32 whatever the input."""
    metric, rank = tokens_and_rank(1, 130, 64)
    metric = (8 + metric / 4).to(dtype)
    result, index = backend.run("nearest_token", metric.to(backend.device), rank.to(backend.device), 1, "euclidean")
    truth = similarities(metric, rank, 1, "euclidean")
    allowed = 6 * torch.finfo(torch.float32).eps * metric.double().square().sum(-1).max().item()
    found = index.cpu() >= 0
    chosen = truth.gather(2, index.cpu().clamp_min(0).unsqueeze(2)).squeeze(2)
    assert (result.cpu().double() - chosen)[found].abs().max() < allowed
    assert (chosen >= truth.amax(2) - 2 * allowed)[found].all()


@each_backend
def test_definition(backend: Backend) -> None:
    """Tokens in the plane, by their angles: the prefix is nearest to all, and belongs to nobody."""
    degrees = torch.tensor([[40.0, 0.0, 50.0, 40.0, 90.0, 170.0]]).deg2rad()
    metric = torch.stack([degrees.cos(), degrees.sin()], 2) * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 7.0])[:, None]
    rank = torch.tensor([[-9, 3, 1, 2, 0, 1]])
    args = (metric.to(backend.device), rank.to(backend.device), 1)
    similarity, index = backend.run("nearest_token", *args)
    assert index.tolist() == [[-1, 3, 4, 2, -1, 4]]
    cosines = [-1.0, *(math.cos(math.radians(angle)) for angle in (40, 40, 10)), -1.0, math.cos(math.radians(80))]
    torch.testing.assert_close(similarity[0].cpu(), torch.tensor(cosines))


@each_backend
def test_tf32_changes_float32_on_tensor_cores_alone(backend: Backend) -> None:
    """Factors lose 13 bits: seen in the similarity, and no more than that. Other dtypes and backends ignore it."""
    metric, rank = (tensor.to(backend.device) for tensor in tokens_and_rank(1, 130, 64))
    for dtype in (torch.float32, torch.bfloat16):
        exact, allowed = (
            backend.run("nearest_token", metric.to(dtype), rank, 1, "cosine", tf32) for tf32 in (False, True)
        )
        rounded = dtype == torch.float32 and backend.name in ("cuda", "simt")
        assert torch.equal(exact[0], allowed[0]) != rounded
        if rounded:
            cosine, best = similarities(metric, rank, 1), backend.run("nearest_token", metric, rank, 1)[0]
            tolerance = 2.5e-4  # twice the largest error seen
            torch.testing.assert_close(allowed[0].double(), best, rtol=0, atol=tolerance)
            found = allowed[1] >= 0
            chosen = cosine.gather(2, allowed[1].clamp_min(0).unsqueeze(2)).squeeze(2)
            assert (chosen >= best - 2 * tolerance)[found].all()


@each_backend
@pytest.mark.parametrize("channels", [4, 140])
@pytest.mark.parametrize("kind", RANKS)
def test_equal_similarities_take_the_lowest_position(backend: Backend, kind: str, channels: int) -> None:
    """All similarities are 0, 1 or -1, exactly."""
    _, rank = tokens_and_rank(2, 150, 1, kind)
    generator = torch.Generator().manual_seed(0)
    axis = torch.randint(4, (2, 150), generator=generator)
    length = 2.0 ** torch.randint(-3, 4, (2, 150, 1), generator=generator)
    metric = torch.nn.functional.one_hot(axis, channels) * length * torch.where(rank % 3 == 0, -1, 1).unsqueeze(2)
    similarity, index = backend.run("nearest_token", metric.to(backend.device), rank.to(backend.device), 3)
    all_of_them = similarities(metric, rank, 3)
    best = all_of_them.amax(2)
    for b in range(2):
        for i in range(150):
            equal = (all_of_them[b, i] == best[b, i]).nonzero()[:, 0].tolist()
            expected = (-1.0, -1) if best[b, i] == -math.inf else (best[b, i].item(), equal[0])
            assert (similarity[b, i].item(), index[b, i].item()) == expected


@each_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_copies_of_a_token_are_exactly_as_similar(backend: Backend, similarity: str) -> None:
    """Wherever in a tile they stand: the first copy wins."""
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(1, 3, 70, generator=generator).repeat(1, 50, 1)
    metric[0, -1] = metric[0, 0] + 0.1 * torch.randn(70, generator=generator)
    rank = torch.zeros(1, 150, dtype=torch.int64)
    rank[0, -1] = 1
    _, index = backend.run("nearest_token", metric.to(backend.device), rank.to(backend.device), 0, similarity)
    assert index[0, -1] == 0


@each_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_tokens_without_a_finite_norm_match_nothing(backend: Backend, similarity: str) -> None:
    metric = torch.ones(1, 6, 3)
    metric[0, 0, 0], metric[0, 1, 0], metric[0, 2] = math.nan, -math.inf, 1e30  # the last: beyond float32
    rank = torch.arange(6).unsqueeze(0)
    values, index = backend.run("nearest_token", metric.to(backend.device), rank.to(backend.device), 0, similarity)
    assert index.tolist() == [[-1, -1, -1, -1, 3, 3]]
    same = {"cosine": 1.0, "dot": 3.0, "euclidean": 0.0}[similarity]  # of two equal tokens
    torch.testing.assert_close(values[0].cpu(), torch.tensor([-1.0, -1, -1, -1, same, same]))


@each_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_results_stay_in_range(backend: Backend, similarity: str) -> None:
    """Up to the longest tokens that are compared; opposite ones are the furthest apart."""
    length = torch.finfo(torch.float32).max ** 0.5 * (0.49 if similarity == "euclidean" else 0.99)
    metric = torch.tensor([[[length, 0.0], [-length, 0.0]]], device=backend.device)
    rank = torch.tensor([[0, 1]], device=backend.device)
    values, index = backend.run("nearest_token", metric, rank, 0, similarity)
    assert index.tolist() == [[-1, 0]]
    assert values.isfinite().all()
    _, index = backend.run("nearest_token", 2 * metric.abs(), rank, 0, similarity)
    assert index.tolist() == [[-1, -1]]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradient_passes_by_zeros_and_nan(device: str, similarity: str) -> None:
    metric, rank = tokens_and_rank(2, 12, 5)
    metric[:, 4] = 0
    metric[:, 5, 0] = math.nan
    metric = metric.to(device).requires_grad_()
    similarity, index = ops.nearest_token(metric, rank.to(device), 1, similarity)
    assert not index.requires_grad
    (grad,) = torch.autograd.grad(similarity[:, 6:].sum(), metric)
    assert grad.isfinite().all()
    assert (grad[:, [0, 5]] == 0).all()
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradient_is_that_of_the_reference(device: str, similarity: str) -> None:
    metric, rank = (tensor.to(device) for tensor in tokens_and_rank(2, 40, 6))
    metric.requires_grad_()
    weight = torch.linspace(1, 2, 80, dtype=torch.float64, device=device).reshape(2, 40)
    (ours,) = torch.autograd.grad((weight * ops.nearest_token(metric, rank, 2, similarity)[0]).sum(), metric)
    (theirs,) = torch.autograd.grad((weight * reference("nearest_token")(metric, rank, 2, similarity)[0]).sum(), metric)
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    prefix = data.draw(st.integers(0, tokens))
    channels = data.draw(st.integers(1, 6))
    ranks = data.draw(st.lists(st.integers(-3, 3), min_size=tokens, max_size=tokens))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    metric, rank = torch.randn(1, tokens, channels, generator=generator), torch.tensor([ranks])
    similarity, index = ops.nearest_token(metric, rank, prefix)
    all_of_them = similarities(metric, rank, prefix)[0]
    for i, (value, j) in enumerate(zip(similarity[0].tolist(), index[0].tolist(), strict=True)):
        if j == -1:
            assert value == -1
            assert (all_of_them[i] == -math.inf).all()
        else:
            assert j >= prefix
            assert ranks[j] < ranks[i]
            assert value == pytest.approx(all_of_them[i, j].item(), abs=1e-6)
            assert value >= all_of_them[i].max().item() - 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(metric=torch.rand(2, 6)), ValueError, r"metric must have shape \[B, N, D\], got \[2, 6\]"),
        (dict(metric=torch.ones(2, 6, 4, dtype=torch.int8)), TypeError, "metric must have one of the dtypes.*int8"),
        (dict(metric=torch.rand(2, 6, 0)), ValueError, r"at least one token and one channel, got shape \[2, 6, 0\]"),
        (dict(metric=torch.rand(2, 0, 4)), ValueError, "at least one token and one channel"),
        (dict(metric=[1.0]), TypeError, "metric must be a torch.Tensor"),
        (dict(rank=None), TypeError, r"rank must be a torch.Tensor \[B, N\], got NoneType"),
        (dict(rank=torch.rand(2, 6)), TypeError, "rank must have dtype int64, got torch.float32"),
        (dict(rank=torch.ones(2, 6, dtype=torch.int32)), TypeError, "rank must have dtype int64, got torch.int32"),
        (dict(rank=torch.ones(2, 5, dtype=torch.int64)), ValueError, r"rank must have shape \[2, 6\].*got \[2, 5\]"),
        (dict(num_prefix=7), ValueError, r"num_prefix must be at most 6 \(the number of tokens\), got 7"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0"),
        (dict(similarity="l2"), ValueError, "similarity must be one of cosine, dot, euclidean, got 'l2'"),
        (dict(num_prefix=1.0), TypeError, "num_prefix must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(metric=torch.rand(2, 6, 4), rank=torch.zeros(2, 6, dtype=torch.int64), num_prefix=1)
    with pytest.raises(error, match=words):
        ops.nearest_token(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    metric, rank = torch.rand(2, 6, 4, device=device), torch.zeros(2, 6, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=r"num_prefix must be in 0\.\.6, got 7"):
        torch.ops.tokenprune.nearest_token(metric, rank, 7)
    with pytest.raises(RuntimeError, match="similarity must be one of cosine, dot, euclidean, got 'l2'"):
        torch.ops.tokenprune.nearest_token(metric, rank, 1, "l2")
    with pytest.raises(RuntimeError, match="rank must have dtype int64"):
        torch.ops.tokenprune.nearest_token(metric, rank.int(), 1)
    with pytest.raises(RuntimeError, match="rank must have shape"):
        torch.ops.tokenprune.nearest_token(metric, rank[:, 1:], 1)
