"""`wpr_qk` of some of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.matrix import DTYPES, PREFIXES, Backend, OpMatrix, Sample, each_backend, on_host, queries_and_keys
from torch import Tensor

from tokenprune_ext import ops


def some(batch: int, tokens: int, count: int, num_prefix: int, seed: int = 0) -> Tensor:
    """Ascending positions of ``count`` patch tokens, others in every image."""
    order = torch.rand(batch, tokens - num_prefix, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values + num_prefix


def copied(tensor: Tensor, among: Tensor, num_prefix: int) -> Tensor:
    """The rows that are ranked, side by side."""
    images = [
        torch.stack([head[[*range(num_prefix), *places]] for head in image])
        for image, places in zip(tensor, among.tolist(), strict=True)
    ]
    return torch.stack(images)


class TestWprQkAmong(OpMatrix):
    """Tensors of a sample: q, k, start and among; options: scale, max_iters, tol, num_prefix."""

    op = "wpr_qk"

    def samples(self) -> Iterator[Sample]:
        for prefix in PREFIXES:
            q, k = queries_and_keys(2, 2, 23, 16, prefix)
            for count in (1, 9, 23 - prefix):
                ranked = prefix + count
                each = torch.rand(2, 2, ranked, dtype=torch.float64) + 0.5
                for start in (None, each[0, 0], each):
                    shape = "none" if start is None else list(start.shape)
                    tensors = (q, k, start, some(2, 23, count, prefix, count))
                    yield Sample(tensors, (0.25, 3, 0.0, prefix), f"prefix={prefix} K={count} start={shape}")
        q, k = queries_and_keys(1, 2, 9, 4)
        yield Sample((q, k, None, some(1, 9, 0, 2)), (0.5, 2, 0.0, 2), "the prefix alone")
        for tokens, channels in ((75, 72), (90, 20)):  # tiles that are not full, rows that are not aligned
            q, k = queries_and_keys(2, 1, tokens, channels)
            yield Sample((q, k, None, some(2, tokens, 66, 1)), (channels**-0.5, 2, 0.0, 1), f"d={channels}")
        # A matrix on chip though that of all tokens would not fit, and one formed again, for the host too.
        for tokens, count in ((330, 150), (330, 289)):
            q, k = queries_and_keys(1, 1, tokens, 8)
            yield Sample((q, k, None, some(1, tokens, count, 1)), (0.35, 2, 0.0, 1), f"N={tokens} K={count}")
        for tokens, count in ((197, 186), (900, 800), (3900, 3800)):  # a CPU: a thread's, held, held in part
            q, k = queries_and_keys(2, 1, tokens, 8)
            tensors = (q, k, None, some(2, tokens, count, 1))
            yield Sample(tensors, (0.35, 2, 0.0, 1), f"N={tokens} K={count} B=2", simt=False)
        q, k = queries_and_keys(3, 1, 12, 8)
        q[0, 0, 4, 1] = k[1, 0, 6, 2] = k[2, 0, 5, 3] = float("nan")  # the last in a token that is left out
        among = torch.tensor([[1, 4, 7], [2, 6, 11], [4, 6, 9]])
        yield Sample((q, k, None, among), (0.5, 3, 0.0, 1), "NaN")

    def small_sample(self) -> Sample:
        q, k = queries_and_keys(3, 2, 11, 4)
        start = torch.rand(3, 2, 7, dtype=torch.float64) + 0.5
        return Sample((q, k, start, some(3, 11, 5, 2)), (0.5, 4, 0.0, 2))

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [dtype, dtype, wide, torch.int64]

    def arguments(self, sample: Sample, backend: Backend, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, start, among, scale, iters, tol, num_prefix = super().arguments(sample, backend, dtype)
        return (q, k, scale, start, iters, tol, among, num_prefix)

    def rounding(self, backend: Backend, dtype: torch.dtype, result_dtype: torch.dtype) -> float:
        """On chip, a GPU holds the probabilities of 16-bit inputs in float16."""
        on_chip = backend.name in ("cuda", "simt") and dtype.itemsize == 2
        return torch.finfo(torch.float16).eps if on_chip else super().rounding(backend, dtype, result_dtype)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "count"), [(40, 33), (197, 186), (330, 290), (800, 790)])
def test_what_a_copy_of_the_rows_gives(backend: Backend, dtype: torch.dtype, tokens: int, count: int) -> None:
    """To the bit, from strided views of a packed qkv tensor: also where each head stops on its own."""
    if backend.is_simt and (tokens > 330 or (tokens > 40 and dtype != torch.float32)):
        pytest.skip("takes long on the host")
    channels = 24 if tokens > 40 else 16
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, tokens, 3, 2, channels, generator=generator, dtype=torch.float64)
    packed[..., 1, :] *= 2
    q, k, _ = packed.to(backend.device, dtype).permute(2, 0, 3, 1, 4).unbind(0)
    among = some(2, tokens, count, 2).to(backend.device)
    options = (0.3, None, 30 if tokens < 100 else 3, 1e-3)
    (result,) = backend.run("wpr_qk", q, k, *options, among, 2)
    (expected,) = backend.run("wpr_qk", copied(q, among, 2), copied(k, among, 2), *options)
    assert result.shape == (2, 2, count + 2)
    assert torch.equal(result, expected)


@each_backend
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_all_tokens(backend: Backend, num_prefix: int) -> None:
    q, k = (t.to(backend.device, torch.float32) for t in queries_and_keys(2, 3, 37, 16))
    among = torch.arange(num_prefix, 37, device=backend.device).expand(2, -1)
    (result,) = backend.run("wpr_qk", q, k, 0.25, None, 3, 0.0, among, num_prefix)
    (expected,) = backend.run("wpr_qk", q, k, 0.25, None, 3, 0.0)
    assert torch.equal(result, expected)


@each_backend
def test_written_out(backend: Backend) -> None:
    """Row by row, with the columns of the other tokens left out."""
    q, k = queries_and_keys(2, 2, 12, 8)
    among = torch.tensor([[2, 3, 7, 11], [4, 5, 6, 9]])
    (result,) = backend.run("wpr_qk", *(t.to(backend.device) for t in (q, k)), 0.3, None, 2, 0.0,
                            among.to(backend.device), 2)  # fmt: skip
    logits = torch.einsum("bhic,bhjc->bhij", q, k) * 0.3
    for image, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tokens = [0, 1, *among[image].tolist()]
        scores = dict.fromkeys(tokens, 1.0)
        for _ in range(2):
            following = dict.fromkeys(tokens, 0.0)
            for i in tokens:
                row = logits[image, head, i, tokens].softmax(0).tolist()
                for j, share in zip(tokens, row, strict=True):
                    following[j] += scores[i] * share
            scores = following
        expected = torch.tensor([scores[token] for token in tokens], dtype=torch.float64)
        torch.testing.assert_close(result[image, head].cpu(), expected, rtol=1e-12, atol=1e-12)


BAD_POSITIONS = ([0, 3], [3, 3], [5, 3], [2, 8], [-1, 4])


@pytest.mark.parametrize("positions", BAD_POSITIONS, ids=str)
@pytest.mark.parametrize("backend", [Backend("reference"), Backend("cpu")], ids=["reference", "cpu"])
def test_bad_positions(backend: Backend, positions: list[int]) -> None:
    q = torch.rand(2, 1, 8, 4)
    among = torch.tensor([[2, 3], positions])
    with pytest.raises(RuntimeError, match=r"among must hold ascending positions in 1..7 \(patch tokens\)"):
        backend.run("wpr_qk", q, q, 0.5, None, 2, 0.0, among, 1)


@pytest.mark.parametrize(
    "backend",
    [
        on_host("sm_80"),
        pytest.param(Backend("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
)
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("count", [3, 290])
def test_nothing_outside_is_read_on_a_gpu(backend: Backend, channels: int, count: int) -> None:
    """A position that is outside has queries and keys of zeros."""
    q, k = (t.float() for t in queries_and_keys(1, 1, 300, channels))
    among = some(1, 300, count, 1)
    among[0, 1], among[0, 2] = 300, -1
    given = tuple(t.to(backend.device) for t in (q, k))
    (result,) = backend.run("wpr_qk", *given, 0.5, None, 2, 0.0, among.to(backend.device), 1)
    inside = among.clamp(0, 299)
    rows = [copied(t, inside, 1) for t in (q, k)]
    for part in rows:
        part[:, :, 2:4] = 0
    (expected,) = backend.run("wpr_qk", *(t.to(backend.device) for t in rows), 0.5, None, 2, 0.0)
    assert torch.equal(result, expected)


def test_gradient_goes_to_the_ranked_tokens_alone(device: str) -> None:
    q, k = (t.to(device).requires_grad_() for t in queries_and_keys(2, 2, 9, 4))
    among = torch.tensor([[2, 3, 8], [1, 4, 5]], device=device)
    scores = ops.wpr_qk(q, k, 0.5, None, 2, 0.0, among, 1)
    weights = torch.linspace(-1, 2, scores.numel(), device=device, dtype=scores.dtype).view_as(scores)
    grads = torch.autograd.grad((scores * weights).sum(), (q, k))
    rows = [copied(t.detach(), among, 1).requires_grad_() for t in (q, k)]
    expected = torch.autograd.grad((ops.wpr_qk(*rows, 0.5, None, 2, 0.0) * weights).sum(), rows)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(copied(grad, among, 1), wanted)
        others = torch.ones(2, 9, dtype=torch.bool, device=device).scatter(1, among, False)
        others[:, 0] = False
        assert not grad.transpose(1, 2)[others].any()
        assert wanted.any()


def test_dynamic_shapes(device: str) -> None:
    compiled = torch.compile(ops.wpr_qk, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, count in ((9, 4), (15, 7), (21, 20)):
        q, k = (t.to(device) for t in queries_and_keys(2, 2, tokens, 4))
        among = some(2, tokens, count, 1).to(device)
        assert torch.equal(compiled(q, k, 0.5, None, 2, 0.0, among, 1), ops.wpr_qk(q, k, 0.5, None, 2, 0.0, among, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(among=[[1, 2]] * 2), TypeError, r"among must be a torch.Tensor \[B, K\] or None, got list"),
        (dict(among=torch.ones(2, 2)), TypeError, "among must be int64, got torch.float32"),
        (dict(among=torch.ones(2, 2, dtype=torch.int32)), TypeError, "among must be int64, got torch.int32"),
        (dict(among=torch.tensor([1, 2])), ValueError, r"among must have shape \[B, K\] with the batch of q.*\[2\]"),
        (dict(among=torch.tensor([[1, 2]])), ValueError, r"among must have shape \[B, K\].*got \[1, 2\]"),
        (dict(among=torch.ones(2, 4, dtype=torch.int64)), ValueError, "among must name at most 3 tokens.*got 4"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
        (dict(num_prefix=5), ValueError, r"num_prefix must be at most 4 \(the number of tokens\), got 5"),
        (dict(num_prefix=True), TypeError, "num_prefix must be an int, got True"),
        (dict(num_prefix=0, among=torch.ones(2, 0, dtype=torch.int64)), ValueError, "at least one token must be ranke"),
        (dict(among=None), ValueError, "num_prefix must be 0 without among, got 1"),
        (dict(start=torch.ones(4)), ValueError, r"start must have shape \[3\] or \[2, 3, 3\].*3 tokens are ranked.*4"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    good = dict(q=torch.rand(2, 3, 4, 8), k=torch.rand(2, 3, 4, 8), scale=0.3, num_prefix=1)
    good["among"] = torch.tensor([[1, 3], [1, 2]])
    assert ops.wpr_qk(**good).shape == (2, 3, 3)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        ops.wpr_qk(**(good | arguments))  # type: ignore[arg-type]


def test_the_raw_operator_checks_too(device: str) -> None:
    q = torch.rand(1, 1, 3, 4, device=device)
    among = torch.tensor([[1, 2]], device=device)
    for words, positions, num_prefix in (
        ("among must be int64", among.int(), 1),
        ("two dimensions and the batch size", among.expand(2, -1), 1),
        ("num_prefix must be in 0..3, got 4", among, 4),
        ("at most 1 tokens", among, 2),
        ("num_prefix must be 0 without among", None, 2),
        ("at least one token", among[:, :0], 0),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tokenprune.wpr_qk(q, q, 1.0, None, 2, 0.0, positions, num_prefix)
