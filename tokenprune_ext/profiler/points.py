"""What is measured: one latency for every kind of call, batch size and token count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

MODEL = "model"
BLOCK = "block"  # followed by the index of the block, as in "block 0"


class Point(NamedTuple):
    """One latency to measure.

    Attributes:
        kind: :data:`MODEL`, or "block i" for block i on its own.
        batch_size: images.
        tokens: patch tokens: those that leave the pruning layer of a model, those that enter a block.
    """

    kind: str
    batch_size: int
    tokens: int


def stride_grid(least: int, most: int, stride: int) -> tuple[int, ...]:
    """Every ``stride``-th token count from ``most`` down to ``least``, and ``least``; ascending."""
    return tuple(sorted({least, *range(most, least - 1, -stride)}))


def points_of(kinds: Iterable[str], batch_sizes: Sequence[int], counts: Iterable[int]) -> list[Point]:
    """All combinations, in a fixed order."""
    counts = sorted(counts)
    return [Point(kind, batch, tokens) for kind in kinds for batch in batch_sizes for tokens in counts]
