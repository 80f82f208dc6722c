"""bipartite_match of the vectors of every head: what is compared are their sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ops.test_bipartite_match as single
import pytest
import torch
from ops.matrix import BATCHES, DTYPES, Backend, Sample, each_backend
from torch import Tensor

from tokenprune_ext import ops

HEADS = (1, 3, 6)
# Tokens, prefix tokens and channels.
SHAPES = ((1, 0, 8), (2, 0, 1), (17, 1, 20), (64, 2, 64), (197, 1, 64), (198, 5, 33), (257, 1, 80))


def heads_and_scores(
    batch: int, heads: int, tokens: int, channels: int, partition: str
) -> tuple[Tensor, Tensor | None]:
    """The sums over the heads are as those of ``single.tokens_and_scores``, and no head is like them."""
    total, scores = single.tokens_and_scores(batch, tokens, channels, partition)
    parts = torch.randn(
        batch, heads, tokens, channels, generator=torch.Generator().manual_seed(heads), dtype=torch.float64
    )
    return parts + ((total - parts.sum(1)) / heads).unsqueeze(1), scores


def packed(metric: Tensor) -> Tensor:
    """These keys as a block has them: a view of [B, N, 3, H, D], between queries and values that are NaN."""
    batch, heads, tokens, channels = metric.shape
    qkv = torch.full((batch, tokens, 3, heads, channels), math.nan, dtype=metric.dtype, device=metric.device)
    qkv[:, :, 1] = metric.transpose(1, 2)
    return qkv.permute(2, 0, 3, 1, 4)[1]


class TestBipartiteMatchOfHeads(single.TestBipartiteMatch):
    def samples(self) -> Iterator[Sample]:
        for heads in HEADS:
            for tokens, prefix, channels in SHAPES:
                for partition in single.PARTITIONS:
                    most = 0 if tokens - prefix < 2 else (tokens - prefix + 1) // 2
                    for r in {most // 2, most}:
                        batch = 1 if tokens == 197 else 2
                        name = f"H={heads} N={tokens} p={prefix} D={channels} r={r} {partition}"
                        small = tokens <= 17 or (tokens == 64 and heads == 3 and r == most)
                        given = heads_and_scores(batch, heads, tokens, channels, partition)
                        yield Sample(given, (r, prefix, partition), name, small)
        for batch in BATCHES:
            given = heads_and_scores(batch, 3, 17, 8, "important")
            yield Sample(given, (5, 1, "important"), f"B={batch}", batch != 1)
        metric, scores = heads_and_scores(2, 3, 90, 20, "important")
        metric[:, 1:, 4:60:9] = 0
        metric[:, 1, 5:60:9, 17] = math.nan
        metric[:, 2, 6:60:9, 3] = math.inf
        metric[:, 1, 7:60:9, 3], metric[:, 2, 7:60:9, 3] = math.inf, -math.inf
        metric[:, 0, 8:60:9], metric[:, 1, 8:60:9] = 0, -metric[:, 2, 8:60:9]  # the sums are zero
        for r in (1, 20, 44):
            yield Sample((metric, scores), (r, 2, "important"), f"zeros, NaN and infinities in heads, r={r}", r == 44)

    def small_sample(self) -> Sample:
        return Sample(heads_and_scores(3, 2, 9, 4, "unimportant"), (3, 1, "unimportant"))

    def arguments(self, sample: Sample, backend: Backend, dtype: torch.dtype) -> tuple[Any, ...]:
        metric, *rest = super().arguments(sample, backend, dtype)
        return (packed(metric), *rest)

    def compare_integers(
        self, results: tuple[Tensor, ...], truths: tuple[Tensor, ...], args: tuple[Any, ...], name: str
    ) -> None:
        super().compare_integers(results, truths, (args[0].sum(1), *args[1:]), name)


class TestBipartiteMatchOfHeadsByDistance(TestBipartiteMatchOfHeads):
    similarity = "euclidean"

    def samples(self) -> Iterator[Sample]:
        for sample in super().samples():
            if sample.simt:
                yield Sample(sample.tensors, (*sample.options, self.similarity), sample.name)

    def small_sample(self) -> Sample:
        sample = super().small_sample()
        return Sample(sample.tensors, (*sample.options, self.similarity))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": packed,
    "tokens before heads": lambda metric: metric.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda metric: metric.repeat_interleave(2, 3)[..., ::2],
    "some heads of more": lambda metric: metric.repeat_interleave(2, 1)[:, ::2],
    "not aligned": lambda metric: torch.cat([metric.flatten()[:1], metric.flatten()])[1:].view_as(metric),
}


def same(backend: Backend, left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return all(map(torch.equal, *(backend.run("bipartite_match", *args) for args in (left, right))))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_pairs_whatever_the_strides(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    metric, _ = heads_and_scores(2, 3, 41, 37, "alternate")
    metric = metric.to(backend.device, dtype)
    view = LAYOUTS[layout](metric)
    assert torch.equal(view, metric)
    assert (layout == "not aligned") == view.is_contiguous()
    assert same(backend, (view, None, 20, 1), (metric, None, 20, 1))


@each_backend
def test_tokens_of_one_head_may_lie_anywhere_too(backend: Backend) -> None:
    metric, _ = single.tokens_and_scores(2, 41, 37, "alternate")
    metric = metric.float().to(backend.device)
    for view in (packed(metric.unsqueeze(1))[:, 0], metric.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        assert same(backend, (view, None, 20, 1), (metric, None, 20, 1))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_added_in_order(backend: Backend, dtype: torch.dtype) -> None:
    """Two heads cancel; what their size leaves of the small ones between them are a few bits."""
    if backend.name == "reference":
        pytest.skip("torch's sum has its own order")
    metric, _ = heads_and_scores(2, 6, 90, 21, "alternate")
    large = 2.0 ** (25 if dtype == torch.float64 else 10)
    metric /= large
    metric[:, 1] *= large**2
    metric[:, 5] = -metric[:, 1]
    metric = packed(metric.to(backend.device, dtype))
    wide = metric.to(torch.promote_types(dtype, torch.float32))
    total = torch.zeros_like(wide[:, 0])
    for head in wide.unbind(1):
        total += head
    assert same(backend, (metric, None, 22, 1), (total, None, 22, 1))
    assert not same(backend, (metric, None, 22, 1), (metric[:, [1, 5, 0, 2, 3, 4]], None, 22, 1))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_not_rounded(backend: Backend, dtype: torch.dtype) -> None:
    """Tokens that are much the same: what tells them apart is beyond the 16 bits that each head has."""
    metric, _ = single.tokens_and_scores(2, 90, 20, "alternate")
    heads = torch.stack([1 + metric / 64, metric.flip(1) / 512], 1).to(backend.device, dtype)
    total = heads.float().sum(1)
    assert same(backend, (heads, None, 22, 1), (total, None, 22, 1))
    assert not same(backend, (heads, None, 22, 1), (total.to(dtype), None, 22, 1))


def test_same_bits_on_any_number_of_threads_and_alone() -> None:
    """A thread an image, or all threads on one."""
    cpu, metric = Backend("cpu"), packed(heads_and_scores(5, 6, 150, 64, "alternate")[0].float())
    results = cpu.run("bipartite_match", metric, None, 40, 1)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, cpu.run("bipartite_match", metric, None, 40, 1), results))
        alone = cpu.run("bipartite_match", metric[3:4], None, 40, 1)
        assert all(torch.equal(one, all_images[3:4]) for one, all_images in zip(alone, results, strict=True))


@each_backend
def test_tf32_is_for_sums_too(backend: Backend) -> None:
    """As in the test of one head: what is multiplied is float32, whatever the heads are in."""
    metric, _ = single.tokens_and_scores(1, 130, 64, "alternate")
    heads = torch.stack([1 + metric / 16, metric / 512], 1)
    for dtype in (torch.float32, torch.bfloat16):
        args = (heads.to(backend.device, dtype), None, 30, 1, "alternate", "cosine")
        exact, allowed = (backend.run("bipartite_match", *args, tf32) for tf32 in (False, True))
        assert all(map(torch.equal, exact, allowed)) != (backend.name in ("cuda", "simt"))


def test_scores_go_with_the_tokens_not_with_the_heads() -> None:
    metric, scores = heads_and_scores(2, 6, 5, 4, "important")
    assert scores is not None
    assert ops.bipartite_match(metric, scores, 2, 1, "important")[2].shape == (2, 2)
