"""A pretended device: it says itself how long a call takes, as a known function of the tokens, plus noise and drift."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenprune_ext.profiler.points import Point

Curve = Callable[[int], float]


def flat(tokens: int) -> float:
    return 0.010


def slope(tokens: int) -> float:
    return 0.002 + 5e-5 * tokens


def staircase(tokens: int) -> float:
    """Up by 1 ms behind 32, 64, 96, ... tokens."""
    return 0.004 + 1e-3 * ((tokens - 1) // 32)


def bump(tokens: int) -> float:
    """A slope with a plateau of 3 ms on top: fewer tokens than 60 to 89 are faster, and so are more."""
    return slope(tokens) + (0.003 if 60 <= tokens < 90 else 0.0)


class Device:
    """A ``Target``. ``drift`` is by how much the last of ``calls`` calls is slower than the first."""

    def __init__(self, curve: Curve, noise: float = 0.0, drift: float = 0.0, calls: int = 4000, seed: int = 0) -> None:
        self.curve, self.noise, self.drift, self.calls = curve, noise, drift, calls
        self.random = random.Random(seed)
        self.made = 0
        self.order: list[Point] = []

    def prepare(self, point: Point) -> Callable[[], float]:
        self.order.append(point)
        return lambda: self.curve(point.tokens)

    def clock(self, call: Callable[[], object]) -> float:
        self.made += 1
        seconds = call()
        assert isinstance(seconds, float)
        return seconds * (1 + self.noise * self.random.gauss(0, 1)) * (1 + self.drift * self.made / self.calls)
