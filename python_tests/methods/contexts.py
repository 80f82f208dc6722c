"""What a pruning layer sees: random and adversarial inputs, and the comparison with a slow implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from methods.slow_methods import Pruned
from methods.slow_scores import Image
from torch import Tensor

from tokenprune_ext.methods import Method
from tokenprune_ext.patch import AttentionContext

HEADS, DIM, CHANNELS = 3, 4, 16
KINDS = ("random", "ties", "constant", "dominant")


def context(
    kind: str = "random",
    patches: int = 10,
    prefix: int = 1,
    class_token: bool | None = None,
    *,
    batch: int = 2,
    layer: int = 3,
    depth: int = 12,
    seed: int = 0,
    sizes: bool = False,
    spread: float = 1.5,
) -> AttentionContext:
    """A float64 context.

    Args:
        kind: ``ties``: keys, values and tokens have entries of 1 and -1, the same in every head, so that some are equal
            and their cosines exact. ``constant``: all tokens are the same. ``dominant``: nearly all attention goes to
            one patch token.
        class_token: whether token 0 is a class token; by default whenever there are prefix tokens.
        sizes: tokens stand for 1 to 4 patches each, and log(size) is added to the logits.
        spread: standard deviation of queries, keys and values of the random kinds.
    """
    generator = torch.Generator().manual_seed(1000 * seed + 10 * patches + prefix)
    tokens = prefix + patches

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (spread * normal(batch, HEADS, tokens, DIM) for _ in range(3))
    x = normal(batch, tokens, CHANNELS)
    if kind == "ties":
        k, v = (part[:, :1].sign().expand(-1, HEADS, -1, -1) for part in (k, v))
        x = x[..., :DIM].sign().repeat(1, 1, CHANNELS // DIM)
    elif kind == "constant":
        q, k, v = (part[:, :1, :1].sign().expand(-1, HEADS, tokens, -1) for part in (q, k, v))
        x = x[:, :1].sign().expand(-1, tokens, -1)
    elif kind == "dominant":
        q[..., 0] = q[..., 0].abs() + 1
        k[:, :, prefix + patches // 3] = torch.tensor([80.0, 0, 0, 0], dtype=torch.float64)
    size = bias = None
    if sizes:
        size = torch.randint(1, 5, (batch, tokens), generator=generator).double()
        size[:, :prefix] = 1
        bias = size.log()[:, None, None, :]
    has_class = prefix > 0 if class_token is None else class_token
    return AttentionContext(x, q, k, v, DIM**-0.5, prefix, has_class, layer, depth, size, bias)


def check_reduced(
    method: Method, ctx: AttentionContext, keep: int, slow: Callable[[Image], Pruned], rtol: float = 1e-9
) -> None:
    """The method lets through what the slow implementation does, image by image."""
    reduced = method.reduce(ctx, keep)
    assert reduced.x.shape == (ctx.x.shape[0], ctx.num_prefix + keep, CHANNELS)
    for image in range(ctx.x.shape[0]):
        wanted = slow(Image.of(ctx, image))
        assert reduced.kept[image].tolist() == wanted.kept
        assert reduced.fused == wanted.fused
        close(reduced.x[image], wanted.x, rtol)
        if wanted.size is None:
            assert reduced.size is None
        else:
            assert reduced.size is not None
            close(reduced.size[image], wanted.size)
        if wanted.into is not None:
            assert reduced.into is not None
            into = reduced.into()[image]
            assert {token: int(into[token]) for token in wanted.into} == wanted.into


def check_scores(method: Method, ctx: AttentionContext, slow: Callable[[Image], dict[int, float]]) -> None:
    """The scores of the patch tokens are those of the slow implementation."""
    scores = method.scores(ctx)  # type: ignore[attr-defined]
    assert scores.shape == ctx.x.shape[:2]
    for image in range(ctx.x.shape[0]):
        wanted = slow(Image.of(ctx, image))
        close(scores[image, ctx.num_prefix :], [wanted[token] for token in sorted(wanted)])


def close(found: Tensor, wanted: list[float] | list[list[float]], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=1e-12)
