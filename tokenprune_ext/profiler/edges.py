"""Where a staircase of latencies falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_FALL = 0.01


@dataclass(frozen=True)
class Edge:
    """A token count that is worth pruning to: with one more, a wave more has to run.

    Attributes:
        tokens: patch tokens: the last count before the latency rises.
        next: the next count that was looked at, at which it is higher: the edge is somewhere in ``[tokens, next)``.
        fall: by how much the latency falls from ``next`` to ``tokens``, as a share of the latency at most tokens.
        kernels: those that get faster, where that is known.
    """

    tokens: int
    next: int
    fall: float
    kernels: tuple[str, ...] = ()


def find_edges(tokens: Sequence[int], latency_s: Sequence[float], min_fall: float = MIN_FALL) -> list[Edge]:
    """The falls that matter, from few tokens to many.

    Between neighbouring counts the latency falls by more than on the straight line between both ends of the curve, and
    this excess is at least ``min_fall`` of the latency at most tokens. Counts ascend.
    """
    if len(tokens) < 2:
        return []
    whole = latency_s[-1]
    slope = max(0.0, (whole - latency_s[0]) / (tokens[-1] - tokens[0]))
    edges = []
    for i in range(len(tokens) - 1):
        fall = latency_s[i + 1] - latency_s[i]
        if fall - slope * (tokens[i + 1] - tokens[i]) >= min_fall * whole:
            edges.append(Edge(tokens[i], tokens[i + 1], fall / whole))
    return edges
