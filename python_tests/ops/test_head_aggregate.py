from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, each_backend
from torch import Tensor

from tokenprune_ext import ops


def scores(batch: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    """Scores of mean 1 whose spread grows with the head, so that some heads are too flat and some too wild."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2.5, 1, heads, dtype=torch.float64)[:, None] if heads > 1 else 0.5
    return 1 + spread * torch.rand(batch, heads, tokens, generator=generator, dtype=torch.float64)


class TestHeadAggregate(OpMatrix):
    op = "head_aggregate"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in PREFIXES:
                if prefix < tokens:
                    for heads in (1, 6, 16):
                        name = f"N={tokens} H={heads} p={prefix}"
                        simt = heads < 16 or tokens == 257
                        yield Sample((scores(3, heads, tokens),), (0.01, 0.7, prefix), name, simt)
        for batch in BATCHES:
            yield Sample((scores(batch, 3, 17),), (0.0, 100.0, 1), f"B={batch}")
        yield Sample((scores(2, 3, 17),), (50.0, 60.0, 1), "no head passes")
        for value in (float("nan"), float("inf")):
            for heads in (1, 4):
                poisoned = scores(2, heads, 17)
                poisoned[1, 0, 5] = value
                yield Sample((poisoned,), (0.01, 0.7, 1), f"{value}, {heads} heads")

    def small_sample(self) -> Sample:
        return Sample((scores(3, 6, 9),), (0.01, 0.7, 2))


@each_backend
def test_definition(backend: Backend) -> None:
    """Each image filters its own heads: none passes in the second."""
    flat, wild = [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 4.0, 0.0]
    good, other = [1.0, 1.5, 0.5, 1.0], [1.0, 0.5, 1.0, 1.5]
    values = torch.tensor([[good, flat, other, wild], [flat, wild, flat, wild]], dtype=torch.float64)
    (result,) = backend.run("head_aggregate", values.to(backend.device), 0.01, 0.7, 1)
    two = [((a * a + b * b) / 2) ** 0.5 for a, b in zip(good, other, strict=True)]
    four = [((2 * a * a + 2 * b * b) / 4) ** 0.5 for a, b in zip(flat, wild, strict=True)]
    expected = torch.tensor([[0.0, *two[1:]], [0.0, *four[1:]]], dtype=torch.float64)
    torch.testing.assert_close(result.cpu(), expected)


@each_backend
def test_prefix_tokens_have_no_say(backend: Backend) -> None:
    values = scores(2, 6, 20).to(backend.device)
    loud = values.clone()
    loud[:, :, :3] = 1e6
    assert torch.equal(
        backend.run("head_aggregate", values, 0.01, 0.7, 3)[0], backend.run("head_aggregate", loud, 0.01, 0.7, 3)[0]
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(scores=torch.rand(2, 4)), ValueError, r"scores must have shape \[B, H, N\], got \[2, 4\]"),
        (dict(scores=torch.rand(2, 0, 4)), ValueError, "at least one head"),
        (dict(scores=torch.ones(2, 3, 4, dtype=torch.int64)), TypeError, "int64"),
        (dict(scores=None), TypeError, "scores must be a torch.Tensor"),
        (dict(vmin=0.8), ValueError, "vmin must not be above vmax, got vmin=0.8 and vmax=0.7"),
        (dict(vmin=float("nan")), ValueError, "vmin must not be above vmax"),
        (dict(num_prefix=4), ValueError, "num_prefix must be at most 3 .*at least one patch token.*got 4"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.head_aggregate(**(dict(scores=torch.rand(2, 3, 4)) | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"num_prefix must be in 0\.\.3, got 4"):
        torch.ops.tokenprune.head_aggregate(torch.rand(2, 3, 4, device=device), 0.0, 1.0, 4)
