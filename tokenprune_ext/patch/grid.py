"""Back from the tokens that are left to the full grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int


def restore(tokens: Tensor, source: Tensor, num_prefix: int, fill: float | Tensor = 0.0) -> Tensor:
    """The full grid of patches ``[B, n0, C]``, from the tokens behind a pruning layer.

    Every patch gets the token that stands for it: a kept patch its own, bit for bit, a merged or fused one the token of
    its group. Differentiable in ``tokens`` and ``fill``. The prefix tokens are no part of the grid; they are
    ``tokens[:, :num_prefix]``, as on a dense model.

    A patch no token stands for gets ``fill``. Restored layer by layer, each with the grid of the layer before, it has
    the last value it had::

        grid = embedded[:, num_prefix:]  # the tokens that enter the first block
        for layer, source in tokenprune_ext.trace(model, images).sources.items():
            grid = restore(tokens[layer], source, num_prefix, fill=grid)

    (On a pruned timm model, ``forward_intermediates`` does that by itself.)

    Args:
        tokens: ``[B, num_prefix + n, C]``, behind the layer.
        source: the layer's entry of :attr:`Trace.sources`, int64 ``[B, n0]``: 0-based position among the n patch
            tokens, or -1.
        num_prefix: tokens in front of the patch tokens.
        fill: for patches without a token: a number, or a grid ``[B, n0, C]`` of the tokens' dtype.

    Raises:
        TypeError: ``tokens`` is not floating, ``source`` not int64, or ``fill`` neither number nor such a grid.
        ValueError: shapes that do not fit; on the CPU also a position that is not there.
    """
    _check(tokens, source, num_prefix, fill)
    return full_grid(tokens, source, num_prefix, fill)


def full_grid(tokens: Tensor, source: Tensor, num_prefix: int, fill: float | Tensor) -> Tensor:
    """:func:`restore` without its checks."""
    patches = tokens[:, num_prefix:]
    # Not take_along_dim: in torch.export it fixes the batch size.
    grid = patches.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, patches.shape[2]))
    return torch.where((source < 0)[..., None], fill, grid)


def _check(tokens: Tensor, source: Tensor, num_prefix: int, fill: float | Tensor) -> None:
    check_int("num_prefix", num_prefix, 0)
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"tokens must be a floating tensor, got {_kind(tokens)}")
    if not isinstance(source, Tensor) or source.dtype != torch.int64:
        raise TypeError(f"source must be an int64 tensor, got {_kind(source)}")
    if tokens.dim() != 3 or tokens.shape[1] <= num_prefix:
        raise ValueError(f"tokens must be [B, {num_prefix} + n, C] with n > 0, got {list(tokens.shape)}")
    if source.dim() != 2 or source.shape[0] != tokens.shape[0]:
        raise ValueError(f"source must be [B, n0] with B = {tokens.shape[0]} as in tokens, got {list(source.shape)}")
    if isinstance(fill, Tensor):
        if fill.dtype != tokens.dtype:
            raise TypeError(f"fill must have the dtype of tokens, {tokens.dtype}, got {fill.dtype}")
        if fill.shape != (*source.shape, tokens.shape[2]):
            expected = [*source.shape, tokens.shape[2]]
            raise ValueError(f"fill must be a number or a grid {expected}, got {list(fill.shape)}")
    elif isinstance(fill, bool) or not isinstance(fill, int | float):
        raise TypeError(f"fill must be a number or a grid, got {fill!r}")
    # Looking at values would make the host wait for a GPU, and break a graph; there the gather itself refuses.
    if not torch.compiler.is_compiling() and source.device.type == "cpu" and source.numel():
        low, high = (int(bound) for bound in source.aminmax())
        if low < -1 or high >= tokens.shape[1] - num_prefix:
            raise ValueError(
                f"source has positions {low} to {high}, and there are {tokens.shape[1] - num_prefix} patch tokens: is "
                "it the map of another layer?"
            )


def _kind(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
