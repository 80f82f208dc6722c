from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend
from torch import Tensor

from tokenprune_ext import ops

FUSE = ("none", "mean", "weighted")


def tokens_and_scores(batch: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and scores that float16 holds exactly: a shuffled ladder with steps of 2^-11 (bfloat16 has ties)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    ladder = torch.rand(batch, tokens, generator=generator, dtype=torch.float64).argsort(1)
    return x, ladder.double() / 2048


class TestTopkGather(OpMatrix):
    op = "topk_gather"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p < tokens] if tokens <= 257 else [5]:
                patches = tokens - prefix
                for keep in sorted({1, max(1, patches // 2), max(1, patches - 1), patches}):
                    for fuse in FUSE:
                        x, scores = tokens_and_scores(2, tokens, 20, tokens)
                        name = f"N={tokens} p={prefix} keep={keep} {fuse}"
                        simt = tokens <= 17 or (tokens in (198, 257) and prefix in (0, 5))
                        yield Sample((x, scores), (keep, prefix, fuse), name, simt)
        for channels in (1, 3, 8, 192, 384):
            yield Sample(tokens_and_scores(2, 17, channels), (5, 1, "mean"), f"C={channels}")
        for batch in BATCHES:
            yield Sample(tokens_and_scores(batch, 17, 8), (5, 1, "weighted"), f"B={batch}")
        x, scores = tokens_and_scores(3, 300, 8)
        for levels in (1, 2, 5):
            yield Sample((x, (scores * 2048) % levels), (100, 2, "mean"), f"ties on {levels} levels")
        special = (scores * 2048) % 7
        special[:, 4:50:3] = math.inf
        special[:, 5:50:3] = -math.inf
        special[:, 6:60:3] = math.nan
        special[:, 60:70] = -0.0
        for keep in (1, 10, 20, 150, 280, 290, 298):
            for fuse in ("none", "mean"):
                yield Sample((x, special), (keep, 2, fuse), f"NaN and infinities, keep={keep} {fuse}")
        yield Sample((x, torch.full_like(scores, math.nan)), (7, 2, "none"), "all NaN")
        x = x.clone()
        x[:, 20, 3] = math.nan
        yield Sample((x, scores), (100, 2, "mean"), "NaN in x")

    def small_sample(self) -> Sample:
        x, scores = tokens_and_scores(3, 9, 4)
        return Sample((x, scores * 256), (3, 1, "weighted"))


@each_backend
def test_definition(backend: Backend) -> None:
    x = torch.arange(12.0).reshape(1, 6, 2).to(backend.device)
    scores = torch.tensor([[9.0, 0.5, 0.9, 0.1, 0.9, 0.3]], device=backend.device)
    tokens, index = backend.run("topk_gather", x, scores, 2, 1, "mean")
    assert index.tolist() == [[2, 4]]
    assert tokens.tolist() == [[[0, 1], [4, 5], [8, 9], [(2 + 6 + 10) / 3, (3 + 7 + 11) / 3]]]
    tokens, _ = backend.run("topk_gather", x, scores, 2, 1, "weighted")
    torch.testing.assert_close(tokens[0, -1].cpu(), torch.tensor([0.5 * 2 + 0.1 * 6 + 0.3 * 10, 1.5 + 0.7 + 3.3]))
    assert backend.run("topk_gather", x, scores, 2, 1, "none")[0].shape == (1, 3, 2)


@each_backend
def test_ties_keep_the_lower_index_and_nan_is_last(backend: Backend) -> None:
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[nan, 1.0, -inf, 1.0, nan, 1.0, -0.0, 0.0]], device=backend.device)
    x = torch.zeros(1, 8, 1, device=backend.device)

    def kept(keep: int) -> list[int]:
        return backend.run("topk_gather", x, scores, keep, 0, "none")[1][0].tolist()

    assert kept(2) == [1, 3]
    assert kept(4) == [1, 3, 5, 6]
    assert kept(6) == [1, 2, 3, 5, 6, 7]
    assert kept(7) == [0, 1, 2, 3, 5, 6, 7]


@each_backend
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_may_have_their_own_dtype(backend: Backend, dtype: torch.dtype, score_dtype: torch.dtype) -> None:
    x, scores = (t.to(backend.device) for t in tokens_and_scores(2, 70, 5))
    x, scores = x.to(dtype), scores.to(score_dtype)
    tokens, index = backend.run("topk_gather", x, scores, 20, 1, "weighted")
    truth, order = Backend("reference").run("topk_gather", x.double().cpu(), scores.double().cpu(), 20, 1, "weighted")
    assert torch.equal(index.cpu(), order)
    torch.testing.assert_close(tokens.cpu(), truth.to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_selection_properties(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 60))
    prefix = data.draw(st.integers(0, tokens - 1))
    keep = data.draw(st.integers(1, tokens - prefix))
    value = st.floats(width=32) | st.sampled_from([0.0, 1.0])
    scores = torch.tensor([data.draw(st.lists(value, min_size=tokens, max_size=tokens))])
    x = torch.arange(tokens, dtype=torch.float64).reshape(1, tokens, 1)
    out, index = ops.topk_gather(x, scores, keep, prefix)
    chosen = index[0].tolist()
    assert chosen == sorted(set(chosen))
    assert out[0, :, 0].tolist() == [*range(prefix), *chosen]

    def rank(i: int) -> tuple[bool, float, int]:
        score = scores[0, i].item()
        return (math.isnan(score), 0.0 if math.isnan(score) else -score, i)

    assert chosen == sorted(sorted(range(prefix, tokens), key=rank)[:keep])


@pytest.mark.parametrize("fuse", FUSE)
def test_keeping_all_is_the_identity(device: str, fuse: str) -> None:
    x, scores = (t.to(device) for t in tokens_and_scores(3, 19, 6))
    tokens, index = ops.topk_gather(x, scores, 17, 2, fuse)
    assert torch.equal(tokens, x)
    assert torch.equal(index.cpu(), torch.arange(2, 19).expand(3, -1))


@pytest.mark.parametrize("fuse", FUSE)
def test_gradients(device: str, fuse: str) -> None:
    x, scores = (t.to(device).requires_grad_() for t in tokens_and_scores(2, 8, 3))
    assert torch.autograd.gradcheck(lambda a, s: ops.topk_gather(a, s * 256, 3, 1, fuse)[0], (x, scores))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=torch.rand(2, 6)), ValueError, r"x must have shape \[B, N, C\], got \[2, 6\]"),
        (dict(x=torch.ones(2, 6, 4, dtype=torch.int8)), TypeError, "x must have one of the dtypes.*int8"),
        (dict(scores=torch.rand(3, 6)), ValueError, r"scores must have shape \[2, 6\].*got \[3, 6\]"),
        (dict(scores=torch.rand(2, 5)), ValueError, "scores must have shape"),
        (dict(scores=torch.ones(2, 6, dtype=torch.int64)), TypeError, "scores must have one of the dtypes.*int64"),
        (dict(keep=0), ValueError, "keep must be at least 1, got 0"),
        (dict(keep=6), ValueError, r"keep must be at most 5 \(the number of patch tokens\), got 6"),
        (dict(keep=2.0), TypeError, "keep must be an int"),
        (dict(keep=True), TypeError, "keep must be an int"),
        (dict(num_prefix=7), ValueError, "num_prefix must be at most 6"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0"),
        (dict(fuse="max"), ValueError, "fuse must be one of none, mean, weighted, got 'max'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(x=torch.rand(2, 6, 4), scores=torch.rand(2, 6), keep=3, num_prefix=1)
    with pytest.raises(error, match=words):
        ops.topk_gather(**(good | arguments))  # type: ignore[arg-type]


def test_same_bits_however_threads_share_images() -> None:
    x, scores = (part.float() for part in tokens_and_scores(3, 300, 384))
    args = (x, scores, 250, 2, "mean")
    one = Backend("cpu").run("topk_gather", *args)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, Backend("cpu").run("topk_gather", *args), one))


def test_the_raw_operator_checks_too(device: str) -> None:
    x, scores = torch.rand(2, 6, 4, device=device), torch.rand(2, 6, device=device)
    with pytest.raises(RuntimeError, match=r"keep must be in 1\.\.5, got 6"):
        torch.ops.tokenprune.topk_gather(x, scores, 6, 1)
    with pytest.raises(RuntimeError, match="fuse must be one of"):
        torch.ops.tokenprune.topk_gather(x, scores, 3, 1, "max")
