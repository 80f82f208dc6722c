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

HOST_BACKENDS = [pytest.param(Backend("reference"), id="reference"), pytest.param(Backend("cpu"), id="cpu")]


def merging(
    batch: int, tokens: int, channels: int, prefix: int, keep: int, destinations: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every patch token is kept or dropped at random; the dropped ones go into the first ``destinations`` kept ones."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).double()
    order = torch.rand(batch, tokens - prefix, generator=generator).argsort(1) + prefix
    kept, dropped = order[:, :keep].sort(1).values, order[:, keep:]
    match = torch.randint(0, destinations or max(keep, 1), dropped.shape, generator=generator)
    return x, size, kept, dropped, kept.gather(1, match) if keep else match


class TestMergeTokens(OpMatrix):
    op = "merge_tokens"

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        size = torch.float64 if dtype == torch.float64 else torch.float32
        return [dtype, size, torch.int64, torch.int64, torch.int64]

    def samples(self) -> Iterator[Sample]:
        for tokens in TOKENS:
            for prefix in [p for p in PREFIXES if p <= tokens] if tokens <= 257 else [5]:
                patches = tokens - prefix
                for keep in sorted({min(1, patches), patches // 2, max(0, patches - 1), patches}):
                    if prefix + keep == 0:
                        continue
                    simt = tokens <= 64 or (tokens, prefix) == (198, 5)
                    name = f"N={tokens} p={prefix} keep={keep}"
                    yield Sample(merging(2, tokens, 20, prefix, keep), (prefix,), name, simt)
        for channels in (0, 1, 3, 8, 192, 384):
            yield Sample(merging(2, 17, channels, 1, 5), (1,), f"C={channels}")
        for channels in (100, 640, 643):
            yield Sample(merging(1, 41, channels, 1, 9), (1,), f"several tiles, C={channels}")
        for batch in BATCHES:
            yield Sample(merging(batch, 17, 8, 1, 5), (1,), f"B={batch}")
        for destinations in (1, 2, 5):
            yield Sample(merging(2, 120, 8, 2, 20, destinations), (2,), f"all into {destinations}")
        x, size, kept, dropped, match = merging(3, 70, 8, 2, 30)
        yield Sample((x, None, kept, dropped, match), (2,), "no sizes")
        yield Sample((x, size / 7, kept, dropped, match), (2,), "sizes that are no integers")
        yield Sample((x, size, kept, dropped[:, :0], match[:, :0]), (2,), "nothing is dropped")
        yield Sample((x, size, kept, dropped[:, ::3], match[:, ::3]), (2,), "some are neither kept nor dropped")
        yield Sample((x, size, kept, dropped, match.where(match % 3 > 0, dropped)), (2,), "some go nowhere")
        yield Sample((x, size, kept, dropped, match % 2), (2,), "prefix tokens take nothing in")
        yield Sample((x, size.where(size > 4, 0), kept, dropped, match), (2,), "sizes of 0")
        x = x.clone()
        x[0, 20:60, 3], x[1, 20:60:2, 3], x[2, 20:60:3, 3] = math.nan, math.inf, -math.inf
        yield Sample((x, size, kept, dropped, match), (2,), "NaN and infinities in x")

    def small_sample(self) -> Sample:
        x, size, kept, dropped, match = merging(3, 12, 4, 2, 4)
        match[:, -1] = dropped[:, 0]  # one goes nowhere
        return Sample((x, size / 4, kept, dropped, match), (2,))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_definition(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.arange(16.0, device=backend.device).reshape(1, 8, 2).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = torch.tensor([[1, 2, 1, 3, 1, 1, 2, 4]], device=backend.device).to(wide)
    kept, dropped, match = (
        torch.tensor([index], device=backend.device) for index in ([1, 2, 5], [7, 3, 6, 4], [2, 5, 2, 3])
    )
    tokens, sizes, log_sizes = backend.run("merge_tokens", x, size, kept, dropped, match, 1)
    mean = [(1 * 4 + 4 * 14 + 2 * 12) / 7, (1 * 5 + 4 * 15 + 2 * 13) / 7]  # of 2, 7 and 6
    merged = [[0, 1], [2, 3], mean, [(1 * 10 + 3 * 6) / 4, (1 * 11 + 3 * 7) / 4]]
    torch.testing.assert_close(tokens.cpu(), torch.tensor([merged], dtype=torch.float64).to(dtype), rtol=1e-15, atol=0)
    assert sizes.tolist() == [[1, 2, 7, 4]]
    assert sizes.dtype == wide
    logs = torch.tensor([[[[math.log(size) for size in (1, 2, 7, 4)]]]], dtype=torch.float64)
    torch.testing.assert_close(log_sizes.cpu(), logs.to(dtype), rtol=1e-15, atol=0)
    tokens, sizes, _ = backend.run("merge_tokens", x, None, kept, dropped, match, 1)
    assert tokens[0, 2:].tolist() == [[10, 11], [8, 9]]
    assert sizes.tolist() == [[1, 1, 3, 2]]


@each_backend
def test_what_takes_nothing_in_is_copied_bit_for_bit(backend: Backend) -> None:
    x = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 3.0, 3.4e38], device=backend.device).reshape(1, 6, 1)
    size = torch.tensor([[0.0, 3.0, 0.1, math.inf, 7.0, 49.0]], device=backend.device)
    kept, dropped, match = (torch.tensor([i], device=backend.device) for i in ([1, 2, 3, 5], [4], [0]))
    tokens, sizes, _ = backend.run("merge_tokens", x, size, kept, dropped, match, 1)
    assert torch.equal(tokens.view(torch.int32), x[:, [0, 1, 2, 3, 5]].view(torch.int32))
    assert torch.equal(sizes, size[:, [0, 1, 2, 3, 5]])


@each_backend
def test_a_prefix_alone(backend: Backend) -> None:
    x, size, kept, dropped, match = (t.to(backend.device) for t in merging(2, 9, 3, 2, 0))
    tokens, sizes, _ = backend.run("merge_tokens", x, size, kept, dropped, match, 2)
    assert torch.equal(tokens, x[:, :2])
    assert torch.equal(sizes, size[:, :2])


@each_backend
def test_sums_go_in_the_order_of_dropped(backend: Backend) -> None:
    """2^24 + 1 is 2^24 in float32, so the order shows."""
    big = 2.0**24
    x = torch.tensor([1.0, big, -big, 1.0], device=backend.device).reshape(1, 4, 1)
    kept, match = torch.tensor([[0]], device=backend.device), torch.zeros(1, 3, dtype=torch.int64).to(backend.device)
    for order, total in (([1, 2, 3], 1.0), ([3, 1, 2], 2.0), ([1, 3, 2], 0.0)):
        dropped = torch.tensor([order], device=backend.device)
        assert backend.run("merge_tokens", x, None, kept, dropped, match, 0)[0].item() == total / 4


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(kept=[1, 6]), r"kept must hold ascending positions in 1\.\.5"),
        (dict(kept=[0, 1]), "kept must hold ascending"),
        (dict(kept=[3, 2]), "kept must hold ascending"),
        (dict(kept=[2, 2]), "kept must hold ascending"),
        (dict(kept=[-1, 2]), "kept must hold ascending"),
        (dict(dropped=[6]), r"dropped must hold positions in 0\.\.5"),
        (dict(dropped=[-1]), "dropped must hold"),
        (dict(match=[6]), r"match must hold positions in 0\.\.5"),
        (dict(match=[-(2**62)]), "match must hold"),
    ],
)
def test_wrong_positions_are_errors_on_the_cpu(backend: Backend, arguments: dict[str, list[int]], words: str) -> None:
    right = dict(kept=[1, 2], dropped=[4], match=[2])
    # In the second image, so that the check has to look at all of them.
    index = [torch.tensor([right[name], (right | arguments)[name]]) for name in right]
    with pytest.raises(RuntimeError, match=words):
        backend.run("merge_tokens", torch.rand(2, 6, 4), None, *index, 1)


@each_backend
def test_wrong_positions_are_not_followed_by_the_cuda_kernel(backend: Backend) -> None:
    if not (backend.is_simt or backend.device == "cuda"):
        pytest.skip("an error on the CPU, see above")
    x = torch.arange(12.0, device=backend.device).reshape(2, 3, 2)
    far = 2**62
    kept = torch.tensor([[1, far], [-1, 2]], device=backend.device)
    dropped = torch.tensor([[far, 2, -1, 2], [3, -far, 0, 1]], device=backend.device)
    match = torch.tensor([[1, 1, 1, far], [2, 2, 2, -1]], device=backend.device)
    tokens, sizes, _ = backend.run("merge_tokens", x, None, kept, dropped, match, 0)
    assert tokens.tolist() == [[[3, 4], [0, 0]], [[0, 0], [8, 9]]]
    assert sizes.tolist() == [[2, 0], [0, 2]]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_logarithm_is_rounded_once(backend: Backend, dtype: torch.dtype) -> None:
    """Of sizes that ``dtype`` does not hold, and of those that have none."""
    size = torch.cat([torch.arange(1.0, 3000.0, 0.37), torch.tensor([0.0, -0.0, -1.0, math.inf, math.nan, 1e-42])])
    kept = torch.arange(1, size.numel()).unsqueeze(0)
    none = kept[:, :0]
    args = (torch.zeros(1, size.numel(), 0, dtype=dtype), size.unsqueeze(0), kept, none, none)
    _, _, log_sizes = backend.run("merge_tokens", *(arg.to(backend.device) for arg in args), 1)
    places = 2 if dtype == torch.float32 else 0.501  # half a last place: rounded once, from float32
    close = dict(rtol=places * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    torch.testing.assert_close(log_sizes[0, 0, 0].cpu().double(), size.double().log(), **close)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_weighted_sum_and_the_sizes_are_kept(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    prefix = data.draw(st.integers(0, tokens - 1))
    order = data.draw(st.permutations(range(prefix, tokens)))
    keep = data.draw(st.integers(1, tokens - prefix))
    kept, dropped = sorted(order[:keep]), order[keep:]
    match = data.draw(st.lists(st.sampled_from(kept), min_size=len(dropped), max_size=len(dropped)))
    number = st.floats(0.125, 64)
    size = torch.tensor([data.draw(st.lists(number, min_size=tokens, max_size=tokens))], dtype=torch.float64)
    x = torch.randn(1, tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    index = [torch.tensor([i], dtype=torch.int64) for i in (kept, dropped, match)]
    merged, sizes, _ = ops.merge_tokens(x, size, *index, prefix)
    torch.testing.assert_close(sizes.sum(), size.sum())
    torch.testing.assert_close((sizes.unsqueeze(-1) * merged).sum(1), (size.unsqueeze(-1) * x).sum(1))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    low, high = x.amin(1), x.amax(1)
    assert ((low - 1e-12 <= merged) & (merged <= high + 1e-12)).all()  # means


def test_merging_twice_is_merging_once(device: str) -> None:
    """The sizes that come out are the ones to put in next."""
    x = torch.randn(1, 4, 3, dtype=torch.float64, device=device)

    def index(*positions: int) -> Tensor:
        return torch.tensor([positions], device=device)

    once = ops.merge_tokens(x, None, index(0), index(1, 2, 3), index(0, 0, 0))
    first = ops.merge_tokens(x, None, index(0, 3), index(1, 2), index(0, 3))
    for twice, expected in zip(ops.merge_tokens(*first[:2], index(0), index(1), index(0)), once, strict=True):
        torch.testing.assert_close(twice, expected)


def test_same_bits_however_threads_share_images() -> None:
    x, size, *positions = merging(3, 300, 384, 2, 200)
    args = (x.float(), size.float(), *positions, 2)
    one = Backend("cpu").run("merge_tokens", *args)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, Backend("cpu").run("merge_tokens", *args), one))


@pytest.mark.parametrize("size_dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sizes_may_have_any_floating_dtype(device: str, dtype: torch.dtype, size_dtype: torch.dtype) -> None:
    x, size, *index = (t.to(device) for t in merging(2, 30, 5, 1, 9))
    results = ops.merge_tokens(x.to(dtype), size.to(size_dtype), *index, 1)
    assert all(map(torch.equal, results, ops.merge_tokens(x.to(dtype), size, *index, 1)))


@pytest.mark.parametrize("has_size", [True, False])
def test_gradients(device: str, has_size: bool) -> None:
    x, size, kept, dropped, match = (t.to(device) for t in merging(2, 9, 3, 1, 3))
    match[:, 0] = 0  # into the prefix, so lost
    inputs = (x.requires_grad_(), (size / 4).requires_grad_()) if has_size else (x.requires_grad_(),)

    def run(x: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        results = ops.merge_tokens(x, size, kept, dropped, match, 1)
        assert all(result.requires_grad == has_size for result in results[1:])
        return results if has_size else results[:1]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradient_of_a_copy_needs_no_size(device: str) -> None:
    x, size, kept, _, _ = (t.to(device) for t in merging(2, 9, 3, 1, 8))
    none = kept[:, :0]
    size = torch.zeros_like(size).requires_grad_()
    x[0, 3, 1] = math.inf
    x.requires_grad_()
    tokens, sizes, _ = ops.merge_tokens(x, size, kept, none, none, 1)
    (tokens.sum() + 2 * sizes.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(size.grad, torch.full_like(size, 2))


def test_gradient_of_the_logarithm_is_one_over_the_size(device: str) -> None:
    """Also where 16 bits hold neither; a size of 0 whose logarithm counts nowhere does no harm."""
    x, size, kept, dropped, match = (t.to(device) for t in merging(2, 9, 3, 1, 3))
    size[:, 0] = 0  # the prefix token, which stays alone
    size = size.float().requires_grad_()
    match[:, 0] = 0  # lost
    _, sizes, log_sizes = ops.merge_tokens(x.bfloat16(), size, kept, dropped, match, 1)
    (2 * log_sizes[..., 1:]).sum().backward()
    slope = 2 / sizes.detach()
    expected = torch.zeros_like(size).scatter(1, kept, slope[:, 1:])
    for image, (lost, *others) in enumerate(dropped.tolist()):
        assert expected[image, lost] == 0
        for token, goal in zip(others, match[image, 1:].tolist(), strict=True):
            expected[image, token] = expected[image, goal]
    torch.testing.assert_close(size.grad, expected)


GOOD = dict(
    x=torch.rand(2, 6, 4),
    size=torch.ones(2, 6),
    kept=torch.tensor([[1, 2], [3, 5]]),
    dropped=torch.tensor([[4], [1]]),
    match=torch.tensor([[1], [5]]),
    num_prefix=1,
)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=torch.rand(2, 6)), ValueError, r"x must have shape \[B, N, C\], got \[2, 6\]"),
        (dict(x=torch.ones(2, 6, 4, dtype=torch.int8)), TypeError, "x must have one of the dtypes.*int8"),
        (dict(size=torch.ones(2, 5)), ValueError, r"size must have shape \[2, 6\].*got \[2, 5\]"),
        (dict(size=torch.ones(2, 6, 1)), ValueError, r"size must have shape \[B, N\], got \[2, 6, 1\]"),
        (dict(size=torch.ones(2, 6, dtype=torch.int64)), TypeError, "size must have one of the dtypes.*int64"),
        (dict(size=2.0), TypeError, r"size must be a torch.Tensor \[B, N\], got float"),
        (dict(kept=[1, 2]), TypeError, r"kept must be a torch.Tensor \[B, K\], got list"),
        (dict(kept=torch.ones(2, 2)), TypeError, "kept must be int64, got torch.float32"),
        (dict(kept=torch.arange(2)), ValueError, r"kept must have shape \[B, K\].*got \[2\]"),
        (dict(kept=torch.arange(2).expand(3, 2)), ValueError, "kept must have shape.*with the batch of x"),
        (dict(kept=torch.arange(6).expand(2, 6)), ValueError, "kept must name at most 5 tokens an image.*got 6"),
        (dict(kept=torch.ones(2, 0, dtype=torch.int64), num_prefix=0), ValueError, "at least one token must be left"),
        (dict(dropped=torch.ones(2, 1, dtype=torch.int32)), TypeError, "dropped must be int64, got torch.int32"),
        (dict(match=torch.ones(2, 2, dtype=torch.int64)), ValueError, r"shape of dropped, \[2, 1\], got \[2, 2\]"),
        (dict(num_prefix=7), ValueError, "num_prefix must be at most 6"),
        (dict(num_prefix=-1), ValueError, "num_prefix must be at least 0"),
        (dict(num_prefix=True), TypeError, "num_prefix must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.merge_tokens(**(GOOD | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(size=torch.ones(2, 6, dtype=torch.float64)), "size must be float32, float64 for float64 x"),
        (dict(kept=torch.ones(2, 2, dtype=torch.int32)), "kept must be int64"),
        (dict(dropped=torch.ones(1, 1, dtype=torch.int64)), "dropped must have two dimensions and the batch size"),
        (dict(match=torch.ones(2, 3, dtype=torch.int64)), "match must have the shape of dropped"),
        (dict(num_prefix=5), r"kept must name at most 1 tokens an image, got 2"),
        (dict(num_prefix=7), r"num_prefix must be in 0\.\.6, got 7"),
        (dict(kept=torch.ones(2, 0, dtype=torch.int64), num_prefix=0), "at least one token must be left"),
    ],
)
def test_the_raw_operator_checks_too(device: str, arguments: dict[str, object], words: str) -> None:
    values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (GOOD | arguments).items()}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.tokenprune.merge_tokens(**values)
