from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from ops.matrix import BATCHES, TOKENS, Backend, OpMatrix, Sample, each_backend, sizes
from torch import Tensor

from tokenprune_ext import ops

REDUCE = ("mean", "max", "sum")
CHANNELS = (1, 3, 8, 20, 31, 32, 33, 48, 64, 72, 80, 96, 128, 300)


def vectors(batch: int, heads: int, tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, heads, tokens, channels, generator=generator, dtype=torch.float64)


class TestHeadReducedSum(OpMatrix):
    op = "head_reduced_sum"

    def samples(self) -> Iterator[Sample]:
        for tokens, reduce in itertools.product(TOKENS, REDUCE):
            yield Sample((vectors(*sizes(tokens), tokens, 64),), (reduce,), f"N={tokens} {reduce}", tokens <= 197)
        for channels, reduce in itertools.product(CHANNELS, REDUCE):
            yield Sample((vectors(2, 5, 9, channels),), (reduce,), f"d={channels} {reduce}")
        for batch in BATCHES:
            yield Sample((vectors(batch, 1, 17, 8),), ("max",), f"B={batch} H=1")
        for value, reduce in itertools.product((float("nan"), float("inf"), float("-inf")), REDUCE):
            for head, channel in itertools.product(range(3), (3, 37)):
                features = vectors(2, 3, 7, 40)
                features[1, head, 3, channel] = value
                yield Sample((features,), (reduce,), f"{value} in head {head}, channel {channel} {reduce}")
        yield Sample((-vectors(2, 3, 17, 40).abs(),), ("max",), "negative values")

    def small_sample(self) -> Sample:
        return Sample((vectors(3, 2, 5, 4),), ("max",))


@each_backend
@pytest.mark.parametrize("reduce", REDUCE)
def test_definition(backend: Backend, reduce: str) -> None:
    """The sum over channels of the reduction over heads, written out."""
    features = vectors(2, 3, 9, 5).to(backend.device)
    (result,) = backend.run("head_reduced_sum", features, reduce)
    join = {"max": max, "sum": sum, "mean": lambda values: sum(values) / len(values)}[reduce]
    for image, token in itertools.product(range(2), range(9)):
        expected = sum(join(features[image, :, token, channel].tolist()) for channel in range(5))
        assert result[image, token].item() == pytest.approx(expected)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 37])
def test_same_bits_whatever_the_strides(backend: Backend, channels: int, dtype: torch.dtype) -> None:
    """Values as a block has them, views of one tensor [B, N, 3, H, d], and rows that are not aligned."""
    packed = torch.randn(2, 19, 3, 4, channels, generator=torch.Generator().manual_seed(0)).to(backend.device, dtype)
    values = packed.permute(2, 0, 3, 1, 4)[2]
    shifted = torch.empty(values.numel() + 1, dtype=dtype, device=backend.device)[1:].view_as(values).copy_(values)
    for reduce in REDUCE:
        (expected,) = backend.run("head_reduced_sum", values.contiguous(), reduce)
        for view in (values, shifted):
            assert torch.equal(backend.run("head_reduced_sum", view, reduce)[0], expected)


@pytest.mark.parametrize("reduce", REDUCE)
def test_same_bits_of_many_tokens(reduce: str) -> None:
    """On the CPU, whatever thread gets which tokens of which image."""
    features = vectors(5, 6, 150, 64).float()
    (one,) = Backend("cpu").run("head_reduced_sum", features, reduce)
    torch.set_num_threads(3)
    assert torch.equal(Backend("cpu").run("head_reduced_sum", features, reduce)[0], one)
    assert torch.equal(Backend("cpu").run("head_reduced_sum", features[1:2], reduce)[0], one[1:2])


@pytest.mark.parametrize("reduce", REDUCE)
def test_gradients(device: str, reduce: str) -> None:
    features = vectors(2, 3, 4, 5).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: ops.head_reduced_sum(f, reduce), (features,))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(features=torch.rand(2, 3, 4)), ValueError, r"features must have shape \[B, H, N, d\], got \[2, 3, 4\]"),
        (dict(features=torch.rand(2, 0, 4, 5)), ValueError, "at least one head, one token and one channel"),
        (dict(features=torch.rand(2, 3, 4, 0)), ValueError, r"one channel, got shape \[2, 3, 4, 0\]"),
        (dict(features=torch.ones(1, 1, 2, 2, dtype=torch.int32)), TypeError, "int32"),
        (dict(features=[1.0]), TypeError, "features must be a torch.Tensor"),
        (dict(head_reduce="median"), ValueError, "head_reduce must be one of mean, max, sum, got 'median'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.head_reduced_sum(**(dict(features=torch.rand(2, 3, 4, 5)) | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    features = torch.rand(1, 2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="head_reduce must be one of"):
        torch.ops.tokenprune.head_reduced_sum(features, "median")
    with pytest.raises(RuntimeError, match="features must have shape"):
        torch.ops.tokenprune.head_reduced_sum(features[0], "max")
    with pytest.raises(RuntimeError, match="at least one head"):
        torch.ops.tokenprune.head_reduced_sum(features[:, :, :0], "max")
