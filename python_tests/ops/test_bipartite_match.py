from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend
from ops.test_nearest_token import all_pairs
from torch import Tensor

from tokenprune_ext import ops

PARTITIONS = ("alternate", "unimportant", "important")
CHANNELS = (1, 3, 8, 20, 64, 80, 128, 384)


def tokens_and_scores(batch: int, tokens: int, channels: int, partition: str) -> tuple[Tensor, Tensor | None]:
    """Tokens, and scores that float16 holds exactly: a shuffled ladder with steps of 2^-11 (bfloat16 has ties)."""
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    ladder = torch.rand(batch, tokens, generator=generator).argsort(1)
    return metric, None if partition == "alternate" else ladder.double() / 2048


def split(scores: list[float] | None, tokens: int, num_prefix: int, partition: str) -> tuple[list[int], list[int]]:
    """Groups A and B of one image, in ascending order."""
    patches = list(range(num_prefix, tokens))
    if scores is None:
        return patches[::2], patches[1::2]
    worth = {i: -math.inf if math.isnan(scores[i]) else scores[i] for i in patches}
    order = sorted(patches, key=lambda i: (math.isnan(scores[i]), -worth[i], i))
    small = len(patches) // 2
    if partition == "unimportant":
        return sorted(order[small:]), sorted(order[:small])
    return sorted(order[: len(patches) - small]), sorted(order[len(patches) - small :])


def assert_best_pairs(results: tuple[Tensor, ...], args: tuple[Any, ...], name: str, slack: float) -> None:
    """The chosen pairs are the best ones, or no further from them than ``slack``."""
    metric, scores, r, num_prefix, partition, *rest = args
    pairs = all_pairs(metric, *rest)
    if rest:  # beyond cosines: relative to the largest square
        squares = metric.square().sum(-1)
        slack *= max([0.0, *squares[squares.isfinite()].tolist()])
    for b in range(metric.shape[0]):
        dropped, match, kept = (result[b] for result in results)
        group_a, group_b = split(None if scores is None else scores[b].tolist(), metric.shape[1], num_prefix, partition)
        assert sorted(dropped.tolist() + kept.tolist()) == [*range(num_prefix, metric.shape[1])], name
        for positions in (dropped, kept):
            assert torch.equal(positions, positions.sort().values), name
        assert set(dropped.tolist()) <= set(group_a), name
        assert set(match.tolist()) <= set(group_b), name
        if r == 0:
            continue
        between = pairs[b][group_a][:, group_b]
        between = torch.where(between.isfinite(), between, -math.inf)
        best = dict(zip(group_a, between.amax(1).tolist(), strict=True))
        for i, j in zip(dropped.tolist(), match.tolist(), strict=True):
            if best[i] == -math.inf:
                assert j == group_b[0], name
            else:
                assert between[group_a.index(i), group_b.index(j)] >= best[i] - slack, name
        worst = min(best[i] for i in dropped.tolist())
        assert all(best[i] <= worst + slack for i in group_a if i not in dropped), name


class TestBipartiteMatch(OpMatrix):
    op = "bipartite_match"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 64 else [1, 5] if tokens <= 257 else [5]:
                patches = tokens - prefix
                most = 0 if patches < 2 else (patches + 1) // 2
                for partition in PARTITIONS:
                    for r in sorted({0, min(1, most), most // 2, most}):
                        large = tokens == 198 and partition == "important"
                        simt = tokens <= 2 or (r == most // 2 and prefix == 5 and (tokens == 17 or large))
                        name = f"N={tokens} p={prefix} r={r} {partition}"
                        given = tokens_and_scores(1 if tokens > 257 else 2, tokens, 20, partition)
                        yield Sample(given, (r, prefix, partition), name, simt)
        for partition in PARTITIONS:
            for channels in CHANNELS:
                given = tokens_and_scores(2, 17, channels, partition)
                simt = partition == "alternate"
                yield Sample(given, (5, 1, partition), f"D={channels} {partition}", simt)
            for batch in BATCHES:
                given = tokens_and_scores(batch, 17, 8, partition)
                yield Sample(given, (5, 1, partition), f"B={batch} {partition}", batch != 1)
        metric, scores = tokens_and_scores(2, 90, 20, "important")
        assert scores is not None
        for levels in (1, 2, 5):
            coarse = (scores * 2048) % levels
            yield Sample((metric, coarse), (30, 2, "unimportant"), f"equal scores on {levels} levels", levels == 2)
        special = (scores * 2048) % 7
        special[:, 4:50:5], special[:, 5:50:5], special[:, 6:50:3] = math.inf, -math.inf, math.nan
        metric[:, 4:60:9] = 0
        metric[:, 5:60:9, 3] = math.nan
        metric[:, 6:60:9, 3] = math.inf
        for r in (1, 20, 40, 44):
            for partition in PARTITIONS:
                given = (metric, None if partition == "alternate" else special)
                name = f"zeros, NaN and infinities, r={r} {partition}"
                yield Sample(given, (r, 2, partition), name, r == 44)
        yield Sample((torch.full_like(metric, math.nan), None), (40, 2, "alternate"), "all NaN")
        yield Sample((torch.zeros_like(metric), special), (40, 2, "important"), "all zeros")

    def small_sample(self) -> Sample:
        metric, scores = tokens_and_scores(3, 9, 4, "unimportant")
        return Sample((metric, scores), (3, 1, "unimportant"))

    def compare_integers(
        self, results: tuple[Tensor, ...], truths: tuple[Tensor, ...], args: tuple[Any, ...], name: str
    ) -> None:
        assert_best_pairs(results, args, name, slack=1e-5)  # results do not tell the dtype of the sums: for float32

    def test_gradcheck(self, device: str) -> None:
        """There is no gradient to check: positions do not ask for one."""
        args = self.arguments(self.small_sample(), Backend(device), torch.float64)
        args[0].requires_grad_()
        assert not any(result.requires_grad for result in ops.bipartite_match(*args))


class TestBipartiteMatchByProduct(TestBipartiteMatch):
    similarity = "dot"

    def samples(self) -> Iterator[Sample]:
        """Every kind of input once: what the similarity changes is not the shape."""
        for sample in super().samples():
            if sample.simt:
                yield Sample(sample.tensors, (*sample.options, self.similarity), sample.name)

    def small_sample(self) -> Sample:
        sample = super().small_sample()
        return Sample(sample.tensors, (*sample.options, self.similarity))


class TestBipartiteMatchByDistance(TestBipartiteMatchByProduct):
    similarity = "euclidean"


def plane(degrees: list[float]) -> Tensor:
    angles = torch.tensor([degrees]).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 2)


@each_backend
def test_definition(backend: Backend) -> None:
    metric = plane([5.0, 0.0, 3.0, 40.0, 42.0, 90.0, 6.0]).to(backend.device)
    # A: 1, 3, 5 (0, 40, 90 degrees); B: 2, 4, 6 (3, 42, 6 degrees)
    dropped, match, kept = backend.run("bipartite_match", metric, None, 2, 1, "alternate")
    assert (dropped.tolist(), match.tolist(), kept.tolist()) == ([[1, 3]], [[2, 4]], [[2, 4, 5, 6]])
    scores = torch.tensor([[9.0, 1.0, 5.0, 2.0, math.nan, 6.0, 5.0]], device=backend.device)
    # The more important half: 2, 5, 6 (3, 90, 6 degrees); the less important one: 1, 3, 4 (0, 40, 42 degrees)
    dropped, match, kept = backend.run("bipartite_match", metric, scores, 2, 1, "unimportant")
    assert (dropped.tolist(), match.tolist(), kept.tolist()) == ([[1, 3]], [[2, 6]], [[2, 4, 5, 6]])
    dropped, match, kept = backend.run("bipartite_match", metric, scores, 2, 1, "important")
    assert (dropped.tolist(), match.tolist(), kept.tolist()) == ([[2, 6]], [[1, 1]], [[1, 3, 4, 5]])


@each_backend
def test_tf32_changes_float32_on_tensor_cores_alone(backend: Backend) -> None:
    """Among tokens that are much the same, pairs change; they stay as good but for the 13 bits that factors lose."""
    metric, _ = tokens_and_scores(1, 130, 64, "alternate")
    metric = 1 + metric / 16
    for dtype in (torch.float32, torch.bfloat16):
        args = (metric.to(backend.device, dtype), None, 30, 1, "alternate")
        exact, allowed = (backend.run("bipartite_match", *args, "cosine", tf32) for tf32 in (False, True))
        rounded = dtype == torch.float32 and backend.name in ("cuda", "simt")
        assert all(map(torch.equal, exact, allowed)) != rounded
        if rounded:
            results = tuple(result.cpu() for result in allowed)
            assert_best_pairs(results, (metric, *args[1:]), "tf32", slack=5e-4)


@each_backend
def test_other_similarities_pair_by_length_and_by_place(backend: Backend) -> None:
    metric = torch.tensor([[[4.0, 0.0], [5.0, 4.0], [0.0, 1.0], [1.0, 0.0]]], device=backend.device)
    # A: 0 and 2; B: 1 and 3
    for similarity, dropped, match in (("cosine", 0, 3), ("dot", 0, 1), ("euclidean", 2, 3)):
        results = backend.run("bipartite_match", metric, None, 1, 0, "alternate", similarity)
        assert (results[0].tolist(), results[1].tolist()) == ([[dropped]], [[match]])


@each_backend
def test_the_extra_token_goes_to_group_a(backend: Backend) -> None:
    metric = plane([0.0, 10.0, 20.0]).to(backend.device)
    scores = torch.tensor([[1.0, 1.0, 1.0]], device=backend.device)  # the lower position is more important

    def run(partition: str) -> list[list[int]]:
        given = None if partition == "alternate" else scores
        return [t[0].tolist() for t in backend.run("bipartite_match", metric, given, 2, 0, partition)]

    assert run("alternate") == [[0, 2], [1, 1], [1]]
    assert run("unimportant") == [[1, 2], [0, 0], [0]]
    assert run("important") == [[0, 1], [2, 2], [2]]


@each_backend
def test_equal_similarities_take_the_lower_positions(backend: Backend) -> None:
    metric = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1, 0, 0, 2, 1, 0, 3]]), 4).float().to(backend.device)
    # A: 0, 2, 4, 6, 8 on axes 0, 1, 0, 2, 0; B: 1, 3, 5, 7, 9 on axes 0, 1, 0, 1, 3
    for r, dropped, match in ((2, [0, 2], [1, 3]), (3, [0, 2, 4], [1, 3, 1]), (5, [0, 2, 4, 6, 8], [1, 3, 1, 1, 1])):
        result = backend.run("bipartite_match", metric, None, r, 0, "alternate")
        assert [result[0][0].tolist(), result[1][0].tolist()] == [dropped, match]


@each_backend
def test_tokens_without_a_similarity_come_last(backend: Backend) -> None:
    metric = torch.ones(1, 6, 2)
    metric[0, 0, 0] = metric[0, 1, 1] = math.nan
    metric[0, 2] = -1
    metric = metric.to(backend.device)
    # A: 0 (NaN), 2 (similarity -1), 4 (similarity 1); B: 1 (NaN), 3, 5
    for r, dropped, match in ((1, [4], [3]), (2, [2, 4], [3, 3]), (3, [0, 2, 4], [1, 3, 3])):
        result = backend.run("bipartite_match", metric, None, r, 0, "alternate")
        assert [result[0][0].tolist(), result[1][0].tolist()] == [dropped, match]


@each_backend
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_may_have_their_own_dtype(backend: Backend, dtype: torch.dtype, score_dtype: torch.dtype) -> None:
    metric, scores = tokens_and_scores(2, 70, 20, "important")
    assert scores is not None
    args = (metric.to(backend.device, dtype), scores.to(backend.device, score_dtype), 20, 1, "important")
    truth = Backend("reference").run("bipartite_match", metric.to(dtype).double(), scores, 20, 1, "important")
    for result, expected in zip(backend.run("bipartite_match", *args), truth, strict=True):
        assert torch.equal(result.cpu(), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    """On a few axes, where all similarities are exact: pairs by the definition, one after the other."""
    tokens = data.draw(st.integers(1, 40))
    prefix = data.draw(st.integers(0, tokens))
    partition = data.draw(st.sampled_from(PARTITIONS))
    axes = data.draw(st.lists(st.integers(0, 4), min_size=tokens, max_size=tokens))
    value = st.floats(width=32) | st.sampled_from([0.0, 1.0])
    scores = None if partition == "alternate" else data.draw(st.lists(value, min_size=tokens, max_size=tokens))
    group_a, group_b = split(scores, tokens, prefix, partition)
    r = data.draw(st.integers(0, len(group_a) if group_b else 0))
    pairs = []
    for i in group_a if group_b else []:
        similarity, j = min((-float(axes[i] == axes[j]), j) for j in group_b)
        pairs.append((similarity, i, j))
    chosen = sorted(sorted(pairs)[:r], key=lambda pair: pair[1])
    metric = torch.nn.functional.one_hot(torch.tensor([axes]), 5).float()
    given_scores = None if scores is None else torch.tensor([scores])
    dropped, match, kept = ops.bipartite_match(metric, given_scores, r, prefix, partition)
    assert dropped[0].tolist() == [i for _, i, _ in chosen]
    assert match[0].tolist() == [j for _, _, j in chosen]
    assert kept[0].tolist() == sorted({*group_a, *group_b} - set(dropped[0].tolist()))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            dict(metric=torch.rand(2, 6)),
            ValueError,
            r"metric must have shape \[B, N, D\] or \[B, H, N, D\], got \[2, 6\]",
        ),
        (dict(metric=torch.ones(2, 6, 4, dtype=torch.int8)), TypeError, "metric must have one of the dtypes.*int8"),
        (dict(metric=torch.rand(2, 6, 0)), ValueError, "at least one token and one channel"),
        (dict(metric=torch.rand(2, 0, 6, 4)), ValueError, r"at least one head, one token and one .*\[2, 0, 6, 4\]"),
        (
            dict(metric=torch.rand(2, 6, 5, 4)),
            ValueError,
            r"shape \[2, 5\] to go with metric \[2, 6, 5, 4\], got \[2, 6",
        ),
        (dict(metric=torch.rand(1, 2, 6, 5, 4)), ValueError, r"metric must have shape .*, got \[1, 2, 6, 5, 4\]"),
        (dict(scores=None), ValueError, r"partition='important' needs scores \[B, N\], got None"),
        (dict(partition="alternate"), ValueError, "scores must be None with partition='alternate'"),
        (dict(scores=torch.rand(2, 5)), ValueError, r"scores must have shape \[2, 6\].*got \[2, 5\]"),
        (dict(scores=torch.ones(2, 6, dtype=torch.int64)), TypeError, "scores must have one of the dtypes.*int64"),
        (dict(r=4), ValueError, r"r must be at most 3 \(the larger half of 5 patch tokens\), got 4"),
        (dict(r=1, num_prefix=5), ValueError, r"r must be at most 0 \(there is nobody to match with among 1 patch"),
        (dict(r=-1), ValueError, "r must be at least 0, got -1"),
        (dict(r=2.0), TypeError, "r must be an int"),
        (dict(num_prefix=7), ValueError, "num_prefix must be at most 6"),
        (dict(similarity="l2"), ValueError, "similarity must be one of cosine, dot, euclidean, got 'l2'"),
        (dict(partition="random"), ValueError, "partition must be one of alternate, unimportant, important, got 'ra"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(metric=torch.rand(2, 6, 4), scores=torch.rand(2, 6), r=2, num_prefix=1, partition="important")
    with pytest.raises(error, match=words):
        ops.bipartite_match(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    metric, scores = torch.rand(2, 6, 4, device=device), torch.rand(2, 6, device=device)
    for args, words in (
        ((None, 4, 1, "alternate"), r"r must be in 0\.\.3, got 4"),
        ((None, 1, 5, "alternate"), r"r must be in 0\.\.0, got 1"),
        ((scores, 1, 1, "alternate"), "scores must be None"),
        ((None, 1, 1, "important"), "needs scores"),
        ((scores[:, 1:], 1, 1, "important"), "scores must have shape"),
        ((scores, 1, 1, "random"), "partition must be one of"),
        ((None, 1, 1, "alternate", "l2"), "similarity must be one of"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.bipartite_match(metric, *args)
    for shape, words in (
        ((2, 6), r"metric must have shape \[B, N, D\] or \[B, H, N, D\]"),
        ((2, 0, 6, 4), "at least one head"),
        ((2, 3, 6, 0), "one channel"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.bipartite_match(torch.rand(shape, device=device), None, 0, 0)
