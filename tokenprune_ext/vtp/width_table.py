"""Measured latencies of a model's blocks at other widths."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune_ext.channels import PLACES, Widths, blocks_of, narrow_block, widths_of
from tokenprune_ext.latency import Clock, time_in_turns
from tokenprune_ext.patch import UnsupportedModelError, inspect_host

from .gates import remove_gates


@dataclass(frozen=True)
class Surface:
    """Measured seconds of one half of a block over two widths, linear in between.

    Attributes:
        first, second: ascending widths.
        seconds: ``[len(first)][len(second)]``.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __call__(self, first: int, second: int) -> float:
        """Seconds at these widths; outside of the measured ones, those of the nearest."""
        (i, x), (j, y) = _between(self.first, first), _between(self.second, second)
        after = min(j + 1, len(self.second) - 1)
        low, high = (
            row[j] * (1 - y) + row[after] * y
            for row in (self.seconds[i], self.seconds[min(i + 1, len(self.first) - 1)])
        )
        return low * (1 - x) + high * x


@dataclass(frozen=True)
class WidthTable:
    """What the blocks of a model take at all widths, on one device and batch.

    Attributes:
        attention: over the widths in front of ``attn.qkv`` and ``attn.proj``.
        mlp: over those in front of ``mlp.fc1`` and ``mlp.fc2``.
        outside_s: seconds of the model that no block's halves explain.
    """

    attention: Surface
    mlp: Surface
    outside_s: float

    def estimate(self, widths: Sequence[Widths]) -> float:
        """Seconds of a model whose blocks have these widths."""
        blocks = (self.attention(qkv, proj) + self.mlp(fc1, fc2) for qkv, proj, fc1, fc2 in widths)
        return self.outside_s + sum(blocks)


def measure_widths(
    model: nn.Module,
    images: Tensor,
    *,
    points: int = 4,
    align: int = 1,
    budget_s: float = 20.0,
    clock: Clock | None = None,
) -> WidthTable:
    """Time both halves of a block over a grid of widths, and the whole model, interleaved.

    Args:
        model: a dense model, or one with gates, on its device in its dtype; it is not changed.
        images: the batch ``[B, 3, H, W]``, on the same device.
        points: widths of every place, evenly spread; one channel is another.
        align: the widths are multiples of it.
        budget_s, clock: see ``latency.time_in_turns``.

    Raises:
        UnsupportedModelError: the blocks differ in their widths.
    """
    dense = remove_gates(copy.deepcopy(model)).eval()
    blocks, full = blocks_of(dense), widths_of(dense)
    if len(set(full)) > 1:
        raise UnsupportedModelError("a table of widths needs blocks that are alike; measure before channels go")
    grids = [_grid(width, points, align) for width in full[0]]
    host = inspect_host(dense)
    tokens = torch.randn(len(images), host.num_prefix_tokens + host.num_patches, host.channels)
    tokens = tokens.to(images)
    calls: dict[str, Callable[[], object]] = {"model": partial(dense, images)}
    for half, run, (first, second) in (("attention", _attention, (0, 1)), ("mlp", _mlp, (2, 3))):
        for pair in product(grids[first], grids[second]):
            widths = [1] * len(PLACES)  # the other half is not run
            widths[first], widths[second] = pair
            block = copy.deepcopy(blocks[0])
            narrow_block(block, [torch.arange(width) for width in widths])
            calls[f"{half} {pair}"] = partial(run, block, tokens)
    with torch.inference_mode(), torch.cuda.device(images.device) if images.is_cuda else nullcontext():
        times = time_in_turns(calls, cuda=images.is_cuda, budget_s=budget_s, clock=clock)
    median = {name: statistics.median(rounds) for name, rounds in times.items()}
    attention, mlp = (
        Surface(a, b, tuple(tuple(median[f"{half} {(x, y)}"] for y in b) for x in a))
        for half, a, b in (("attention", grids[0], grids[1]), ("mlp", grids[2], grids[3]))
    )
    blocks_s = len(blocks) * (attention.seconds[-1][-1] + mlp.seconds[-1][-1])
    return WidthTable(attention, mlp, max(0.0, median["model"] - blocks_s))


def _attention(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block.attn(block.norm1(x))
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block.mlp(block.norm2(x))
    return out


def _grid(width: int, points: int, align: int) -> tuple[int, ...]:
    """Ascending widths up to a place's own, in multiples of ``align``, the smallest first."""
    even = (-(-width * step // points) for step in range(1, points + 1))
    return tuple(sorted({min(width, align), *(min(width, -(-value // align) * align) for value in even)}))


def _between(grid: tuple[int, ...], value: int) -> tuple[int, float]:
    """The position in a grid below a value, and how far on the way to the next one it is."""
    below = max((index for index, point in enumerate(grid) if point <= value), default=0)
    if below + 1 == len(grid) or value < grid[0]:
        return below, 0.0
    return below, (value - grid[below]) / (grid[below + 1] - grid[below])
