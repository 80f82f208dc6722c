from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from ops.matrix import BATCHES, PREFIXES, TOKENS, Backend, OpMatrix, Sample, attention, each_backend, sizes

from tokenprune_ext import ops

REDUCE = ("mean", "max", "sum")
ROWS = ("all", "patch", "cls")


class TestAttnColsum(OpMatrix):
    op = "attn_colsum"

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            attn = attention(*sizes(tokens), tokens)
            prefixes = [p for p in PREFIXES if p <= tokens] if tokens <= 64 else [5]
            for reduce, rows, prefix in itertools.product(REDUCE, ROWS if tokens <= 257 else ["patch"], prefixes):
                if rows != "cls" or prefix > 0:
                    name = f"N={tokens} {reduce} {rows} p={prefix}"
                    simt = tokens < 64 or (tokens <= 257 and prefix == 5)
                    yield Sample((attn,), (reduce, rows, prefix), name, simt)
        for batch in BATCHES:
            yield Sample((attention(batch, 1, 17),), ("max", "patch", 1), f"B={batch} H=1")
        for value, reduce in itertools.product((float("nan"), float("inf")), REDUCE):
            for head in range(3):
                attn = attention(2, 3, 17)
                attn[1, head, 3, 4] = value
                yield Sample((attn,), (reduce, "patch", 1), f"{value} in head {head} {reduce}")
        yield Sample((attention(2, 3, 17) - 1.0,), ("max", "all", 0), "negative values")

    def small_sample(self) -> Sample:
        return Sample((attention(3, 3, 7),), ("max", "patch", 2))


@each_backend
def test_definition(backend: Backend) -> None:
    """sum over patch queries of the maximum over heads, written out."""
    attn = attention(2, 3, 9).to(backend.device)
    (result,) = backend.run("attn_colsum", attn, "max", "patch", 2)
    for image in range(2):
        for key in range(9):
            expected = sum(max(attn[image, h, q, key].item() for h in range(3)) for q in range(2, 9))
            assert result[image, key].item() == pytest.approx(0.0 if key < 2 else expected)


@pytest.mark.parametrize("reduce", REDUCE)
def test_same_bits_of_several_blocks_of_queries(reduce: str) -> None:
    """On the CPU, whatever thread gets which block of which image."""
    attn = attention(2, 3, 150).float()
    (one,) = Backend("cpu").run("attn_colsum", attn, reduce, "patch", 1)
    torch.set_num_threads(3)
    assert torch.equal(Backend("cpu").run("attn_colsum", attn, reduce, "patch", 1)[0], one)
    assert torch.equal(Backend("cpu").run("attn_colsum", attn[1:], reduce, "patch", 1)[0], one[1:])


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("rows", ROWS)
def test_gradients(device: str, reduce: str, rows: str) -> None:
    attn = attention(2, 3, 5).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ops.attn_colsum(a, reduce, rows, 1), (attn,))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(attn=torch.rand(2, 3, 4, 5)), ValueError, "equal last dimensions"),
        (dict(attn=torch.ones(1, 1, 2, 2, dtype=torch.int32)), TypeError, "int32"),
        (dict(head_reduce="median"), ValueError, "head_reduce must be one of mean, max, sum, got 'median'"),
        (dict(query_rows="class"), ValueError, "query_rows must be one of all, patch, cls, got 'class'"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
        (dict(num_prefix=5), ValueError, r"num_prefix must be at most 4 \(the number of tokens\), got 5"),
        (dict(num_prefix=1.0), TypeError, "num_prefix must be an int"),
        (dict(query_rows="cls", num_prefix=0), ValueError, "needs a class token"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.attn_colsum(**(dict(attn=torch.rand(2, 3, 4, 4)) | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    attn = torch.rand(1, 2, 3, 3, device=device)
    with pytest.raises(RuntimeError, match="head_reduce must be one of"):
        torch.ops.tokenprune.attn_colsum(attn, "median")
    with pytest.raises(RuntimeError, match=r"num_prefix must be in 0\.\.3, got 4"):
        torch.ops.tokenprune.attn_colsum(attn, "mean", "all", 4)
