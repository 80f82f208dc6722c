"""What a method can ask of a block's attention, against an explicit softmax."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from methods.contexts import CHANNELS, context

BIASES = ("none", "keys", "padding", "dense", "dense and keys", "dense of each image")
CASES = [(head_reduce, rows) for head_reduce in ("max", "mean", "sum") for rows in ("all", "patch", "cls")]


def biased(kind, dtype=torch.float64, dim=4):
    """A context with something added to the logits, and its attention matrix."""
    ctx = context(patches=9, prefix=2, layer=5)
    generator = torch.Generator().manual_seed(1)
    batch, heads, tokens, _ = ctx.q.shape
    if dim != 4:
        q, k = (torch.randn(batch, heads, tokens, dim, generator=generator).double() for _ in range(2))
        ctx = dataclasses.replace(ctx, q=q, k=k, scale=dim**-0.5)
    size = torch.randint(1, 6, (batch, tokens), generator=generator).double()
    if kind == "padding":
        size[0, 5] = size[1, 3] = size[1, 10] = 0
    keys = size.log()[:, None, None, :]
    dense = torch.randn(batch if "each" in kind else 1, heads, tokens, tokens, generator=generator).double()
    bias = {"none": None, "keys": keys, "padding": keys, "dense and keys": dense + keys}.get(kind, dense)
    parts = {"x": ctx.x, "q": ctx.q, "k": ctx.k, "v": ctx.v, "bias": bias}
    ctx = dataclasses.replace(ctx, size=size, **{n: None if t is None else t.to(dtype) for n, t in parts.items()})
    logits = ctx.q.double() @ ctx.k.double().mT * ctx.scale
    return ctx, logits if bias is None else logits + ctx.bias.double()


@pytest.mark.parametrize("dim", [1, 4, 8, 31])
@pytest.mark.parametrize("kind", BIASES)
def test_attention_received(kind, dim):
    ctx, logits = biased(kind, dim=dim)
    attention = logits.softmax(-1)
    for head_reduce, rows in CASES:
        queries = {"all": slice(None), "patch": slice(2, None), "cls": slice(0, 1)}[rows]
        over_heads = {"max": attention.amax(1), "mean": attention.mean(1), "sum": attention.sum(1)}[head_reduce]
        received = ctx.attention_received(head_reduce, rows)
        torch.testing.assert_close(received[:, 2:], over_heads[:, queries].sum(1)[:, 2:])


@pytest.mark.parametrize("tau", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", BIASES)
def test_page_rank(kind, tau):
    ctx, logits = biased(kind)
    attention = (logits / tau).softmax(-1)
    start = torch.linspace(0.5, 2, 11, dtype=torch.float64)
    for first in (None, start):
        rank = torch.ones(2, 3, 11, dtype=torch.float64) if first is None else first.expand(2, 3, -1)
        for _ in range(4):
            rank = torch.einsum("bhij,bhi->bhj", attention, rank)
        torch.testing.assert_close(ctx.page_rank(first, 4, tau=tau), rank)


@pytest.mark.parametrize("kind", BIASES)
def test_class_attention(kind):
    ctx, logits = biased(kind)
    torch.testing.assert_close(ctx.class_attention(), logits.softmax(-1)[:, :, 0])
    with pytest.raises(ValueError, match="needs a class token"):
        dataclasses.replace(ctx, has_class_token=False).class_attention()


@pytest.mark.parametrize("kind", BIASES)
def test_attention_given(kind):
    ctx, logits = biased(kind)
    attention = logits.softmax(-1)[:, :, 0]
    for head_reduce, over_heads in (("max", torch.amax), ("mean", torch.mean), ("sum", torch.sum)):
        torch.testing.assert_close(ctx.attention_given(head_reduce), over_heads(attention, 1))
        lengths = torch.linalg.vector_norm(ctx.v, dim=-1)
        torch.testing.assert_close(ctx.attention_given(head_reduce, True), over_heads(attention * lengths, 1))
    with pytest.raises(ValueError, match="needs a class token"):
        dataclasses.replace(ctx, has_class_token=False).attention_given("mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", BIASES)
def test_low_precision(kind, dtype):
    """Sums are float32, and nothing attends to padding there either."""
    ctx, logits = biased(kind, dtype)
    attention = logits.softmax(-1)
    received, rank = ctx.attention_received("mean", "all"), ctx.page_rank(None, 1)
    assert received.dtype == rank.dtype == ctx.class_attention().dtype == torch.float32
    for found, wanted in ((received[:, 2:], attention.mean(1).sum(1)[:, 2:]), (rank, attention.sum(2))):
        torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0.03)
    if kind == "padding":
        assert received[0, 5] == rank[0, 0, 5] == ctx.class_attention()[1, 0, 10] == 0


@pytest.mark.parametrize("kind", BIASES)
def test_page_rank_among_some(kind):
    """The attention among some tokens is that of all tokens with the others' columns left out."""
    ctx, logits = biased(kind)
    kept = torch.tensor([[2, 3, 5, 8], [4, 7, 9, 10]])
    for images in ([0, 1], [1]):
        parts = {name: getattr(ctx, name)[images] for name in ("x", "q", "k", "v", "size")}
        bias = ctx.bias if ctx.bias is None or len(ctx.bias) == 1 else ctx.bias[images]
        ranks = dataclasses.replace(ctx, **parts, bias=bias).page_rank(None, 1, among=kept[images])
        for image, rank in zip(images, ranks, strict=True):
            tokens = [0, 1, *kept[image].tolist()]
            torch.testing.assert_close(rank, logits[image][:, tokens][:, :, tokens].softmax(-1).sum(1))


def test_take_along_any_dimension():
    ctx = context(patches=6, prefix=1)
    kept = torch.tensor([[1, 4], [2, 6]])
    for image, tokens in enumerate(([0, 1, 4], [0, 2, 6])):
        assert torch.equal(ctx.take(ctx.x, kept)[image], ctx.x[image, tokens])
        assert torch.equal(ctx.take(ctx.q, kept, 2)[image], ctx.q[image][:, tokens])
        assert torch.equal(ctx.take(ctx.q[:1], kept, 2)[image], ctx.q[0][:, tokens])  # one row for all images
    assert ctx.take(ctx.x[:0], kept[:0]).shape == (0, 3, CHANNELS)
