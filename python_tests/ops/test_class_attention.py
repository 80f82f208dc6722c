from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from ops.matrix import BACKENDS, BATCHES, TOKENS, Backend, OpMatrix, Sample, each_backend, queries_and_keys, sizes
from torch import Tensor

from tokenprune_ext import ops

REDUCE = ("mean", "max", "sum")
CHANNELS = (1, 3, 8, 20, 31, 32, 33, 64, 72, 80, 128, 300)

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def given(
    batch: int, heads: int, tokens: int, channels: int, *, v: int = 0, bias: tuple[int, int] | None = None
) -> Given:
    """Queries, keys, values of ``v`` channels, and a bias of so many images and heads."""
    q, k = queries_and_keys(batch, heads, tokens, channels, seed=tokens)
    generator = torch.Generator().manual_seed(channels)
    values = torch.randn(batch, heads, tokens, v, generator=generator, dtype=torch.float64) if v else None
    if bias is None:
        return q, k, values, None
    return q, k, values, torch.randn(*bias, 1, tokens, generator=generator, dtype=torch.float64)


class TestClassAttention(OpMatrix):
    op = "class_attention"

    def samples(self) -> Iterator[Sample]:
        for tokens, reduce in itertools.product(TOKENS, REDUCE):
            batch, heads = sizes(tokens)
            full = given(batch, heads, tokens, 16, v=16, bias=(batch, heads))
            yield Sample(full, (0.25, reduce), f"N={tokens} {reduce}", tokens <= 64 or (tokens, reduce) == (257, "max"))
        for channels in CHANNELS:
            yield Sample(given(2, 3, 19, channels, v=channels), (channels**-0.5, "mean"), f"d={channels}")
            yield Sample(given(2, 3, 19, 16, v=channels), (0.25, "sum"), f"d of v={channels}")
        for batch, shared, reduce in itertools.product(BATCHES, (False, True), REDUCE):
            full = given(batch, 2, 17, 8, v=8, bias=(1 if shared else batch, 1 if shared else 2))
            yield Sample(full, (0.5, reduce), f"B={batch} shared bias={shared} {reduce}")
        yield Sample(given(2, 3, 33, 8), (0.5, "mean"), "attention alone")
        yield Sample(given(2, 1, 33, 8, v=8), (-3.0, "max"), "one head, negative scale")
        q, k, v, bias = given(2, 3, 33, 8, v=8, bias=(2, 3))
        assert v is not None
        assert bias is not None
        yield Sample((q * 30, k, v, None), (1.0, "mean"), "one token takes all")
        padded = bias.index_fill(3, torch.tensor([3, 32]), -math.inf)
        yield Sample((q, k, v, padded), (0.5, "sum"), "padding")
        yield Sample((q, k, v * 0, bias), (0.5, "sum"), "zero values")
        yield Sample((q, k, v, torch.full_like(bias, -math.inf)), (0.5, "mean"), "nothing to attend to")
        whole = (q, k, v, bias)
        for value, reduce in itertools.product((math.nan, math.inf), REDUCE):
            for which, at in enumerate(((0, 0, 0, 1), (0, 1, 5, 2), (1, 0, 6, 3), (1, 2, 0, 7))):
                broken = [tensor.clone() for tensor in whole]
                broken[which][at] = value
                name = f"{value} in argument {which} {reduce}"
                yield Sample(tuple(broken), (0.5, reduce), name, reduce == "max" and math.isnan(value))

    def small_sample(self) -> Sample:
        return Sample(given(3, 2, 9, 4, v=4, bias=(3, 2)), (0.5, "max"))

    def test_gradcheck(self, device: str) -> None:
        """There is no gradient to check: what chooses tokens does not ask for one."""
        args = self.arguments(self.small_sample(), Backend(device), torch.float64)
        args[0].requires_grad_()
        assert not torch.ops.tokenprune.class_attention(*args).requires_grad


@each_backend
@pytest.mark.parametrize("reduce", REDUCE)
def test_definition(backend: Backend, reduce: str) -> None:
    """Softmax of the first query's logits times the length of the value, head by head, written out."""
    q, k, v, bias = given(2, 3, 7, 5, v=4, bias=(1, 3))
    assert v is not None
    assert bias is not None
    args = [tensor.to(backend.device) for tensor in (q, k, v, bias)]
    (result,) = backend.run("class_attention", *args, 0.3, reduce)
    join = {"max": max, "sum": sum, "mean": lambda values: sum(values) / len(values)}[reduce]
    for image, token in itertools.product(range(2), range(7)):
        heads = []
        for head in range(3):
            logits = [0.3 * float(q[image, head, 0] @ k[image, head, j]) + float(bias[0, head, 0, j]) for j in range(7)]
            share = math.exp(logits[token]) / sum(map(math.exp, logits))
            heads.append(share * math.sqrt(sum(float(x) ** 2 for x in v[image, head, token])))
        assert result[image, token].item() == pytest.approx(join(heads))


@pytest.mark.parametrize("backend", BACKENDS[1:])  # plain torch does not promise it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 37])
def test_same_bits_whatever_the_strides(backend: Backend, channels: int, dtype: torch.dtype) -> None:
    """Views of one tensor [B, N, 3, H, d], as a block has them, and rows that are not aligned."""
    packed = torch.randn(2, 19, 3, 4, channels, generator=torch.Generator().manual_seed(0)).to(backend.device, dtype)
    views = packed.permute(2, 0, 3, 1, 4).unbind(0)

    def shifted(tensor: Tensor) -> Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=dtype, device=backend.device)
        return room[1:].view_as(tensor).copy_(tensor)

    (expected,) = backend.run("class_attention", *(view.contiguous() for view in views), None, 0.2, "mean")
    for q, k, v in (views, tuple(map(shifted, views))):
        assert torch.equal(backend.run("class_attention", q, k, v, None, 0.2, "mean")[0], expected)


@pytest.mark.parametrize("channels", [64, 52])
def test_same_bits_however_threads_share_images(channels: int) -> None:
    """A thread may begin at any token, where others take four of them together."""
    q, k = (part.float() for part in given(2, 4, 579, channels)[:2])
    v = torch.randn(2, 4, 579, channels, generator=torch.Generator().manual_seed(0))
    args = (q, k, v, None, 0.1, "max")
    (expected,) = Backend("cpu").run("class_attention", *args)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(Backend("cpu").run("class_attention", *args)[0], expected)


def test_many_tokens_need_no_matrix(device: str) -> None:
    q, k = (part.float().to(device) for part in given(1, 2, 4096, 64)[:2])
    plain = (0.125 * q[:, :, :1] @ k.mT).softmax(-1).squeeze(2).mean(1)
    torch.testing.assert_close(ops.class_attention(q, k, 0.125), plain)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(q=torch.rand(2, 3, 4)), ValueError, r"q must have shape \[B, H, N, d\], got \[2, 3, 4\]"),
        (dict(k=torch.rand(2, 3, 5, 5)), ValueError, "k must have the shape of q"),
        (dict(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (dict(v=torch.rand(2, 3, 5, 5)), ValueError, r"v must have shape \[B, H, N, d\].*got \[2, 3, 5, 5\]"),
        (dict(v=torch.rand(2, 3, 4, 0)), ValueError, r"v must have shape \[B, H, N, d\].*got \[2, 3, 4, 0\]"),
        (dict(v=torch.rand(2, 3, 4, 5).double()), TypeError, "v must have the dtype of q, torch.float32, got torch.f"),
        (dict(v=[1.0]), TypeError, "v must be a torch.Tensor"),
        (dict(bias=torch.rand(2, 3, 4, 4)), ValueError, r"bias must have shape \[1 or B, 1 or H, 1, N\]"),
        (dict(bias=torch.rand(3, 3, 1, 4)), ValueError, r"bias must have shape .*got \[3, 3, 1, 4\]"),
        (dict(bias=torch.rand(1, 1, 1, 4).half()), TypeError, "bias must have the dtype of q"),
        (dict(head_reduce="median"), ValueError, "head_reduce must be one of mean, max, sum, got 'median'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(q=torch.rand(2, 3, 4, 5), k=torch.rand(2, 3, 4, 5), scale=0.5)
    with pytest.raises(error, match=words):
        ops.class_attention(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    q = torch.rand(2, 3, 4, 5, device=device)
    for args, words in (
        ((q, q[:, :, 1:], None, None, 0.5), "k must have the shape of q"),
        ((q, q, q[:, :, 1:], None, 0.5), "v must have shape"),
        ((q, q, q.double(), None, 0.5), "v must have the dtype of q"),
        ((q, q, None, q, 0.5), "bias must have shape"),
        ((q, q, None, None, 0.5, "median"), "head_reduce must be one of"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.class_attention(*args)
