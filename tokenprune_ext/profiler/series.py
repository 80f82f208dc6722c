"""From visits to latencies: one series for each kind of call and batch size, with its noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune_ext.latency import quantile

from .points import Point

_MAD_TO_SD = 1.4826  # of a normal distribution
_MEDIAN_SE = 1.2533  # standard error of a median over that of a mean, for a normal distribution
_REACH = 10  # visits before and behind one that say how fast the machine was then
_PASSES = 2  # of taking drift and medians from each other
_ENOUGH = 8  # neighbours at the smallest distance from which the roughness is taken


@dataclass(frozen=True)
class Series:
    """Latency at every token count that was measured; tuples of one length, ascending in tokens.

    Attributes:
        kind, batch_size: see ``Point``.
        tokens: patch tokens.
        median_s: latency in seconds: the median over the visits, each the median of its calls. Drift of the machine is
            taken out: what a visit and its neighbours in time, which are of random counts, have in common.
        q20_s, q80_s: 20 % and 80 % quantile over all calls as they were timed, in seconds.
        se: relative standard error of each median, from its own visits.
        visits: visits of each point.
        noise: relative standard error of a median: of all visits together, or of how rough the series is from one count
            to the next, whichever is larger.
    """

    kind: str
    batch_size: int
    tokens: tuple[int, ...]
    median_s: tuple[float, ...]
    q20_s: tuple[float, ...]
    q80_s: tuple[float, ...]
    se: tuple[float, ...]
    visits: tuple[int, ...]
    noise: float

    @property
    def latency(self) -> dict[int, float]:
        """Seconds by token count."""
        return dict(zip(self.tokens, self.median_s, strict=True))


Visits = Mapping[tuple[Point, int], Sequence[float]]


def build_series(visits: Visits, *, before: int | None = None) -> dict[tuple[str, int], Series]:
    """The series of all visits, by kind and batch size.

    Args:
        visits: seconds of every call by point and number of the visit, in the order of time.
        before: only visits with a smaller number count; None for all.
    """
    groups: dict[tuple[str, int], list[tuple[int, Sequence[float]]]] = {}
    for (point, number), times in visits.items():
        if before is None or number < before:
            groups.setdefault((point.kind, point.batch_size), []).append((point.tokens, times))
    return {key: _series(*key, group) for key, group in sorted(groups.items())}


def _series(kind: str, batch_size: int, visits: Sequence[tuple[int, Sequence[float]]]) -> Series:
    tokens, place = np.unique([count for count, _ in visits], return_inverse=True)
    time = np.array([statistics.median(times) for _, times in visits])
    median = _medians(time, place)
    for _ in range(_PASSES):
        steady = time / _running_median(time / median[place])
        median = _medians(steady, place)
    residual = np.abs(steady / median[place] - 1)
    count = np.bincount(place)
    own = _MAD_TO_SD * _medians(residual, place) * _small_sample(count)
    together = _MAD_TO_SD * np.median(residual) * _small_sample(np.median(count))
    calls = [[t for other, times in visits if other == each for t in times] for each in tokens]
    return Series(
        kind=kind,
        batch_size=batch_size,
        tokens=tuple(map(int, tokens)),
        median_s=tuple(map(float, median)),
        q20_s=tuple(quantile(times, 0.2) for times in calls),
        q80_s=tuple(quantile(times, 0.8) for times in calls),
        se=tuple(map(float, _MEDIAN_SE * own / np.sqrt(count))),
        visits=tuple(map(int, count)),
        noise=max(float(_MEDIAN_SE * together / np.sqrt(np.median(count))), _roughness(tokens, median)),
    )


def _medians(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Median of the values at each place."""
    return np.array([np.median(values[place == i]) for i in range(place.max() + 1)])


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median of the values up to ``_REACH`` before and behind each."""
    return np.array([np.median(values[max(0, i - _REACH) : i + _REACH + 1]) for i in range(len(values))])


def _small_sample(count: np.ndarray | float) -> np.ndarray:
    """What the median absolute deviation of few values from their own median falls short by."""
    count = np.asarray(count, dtype=float)
    return np.where(count > 1, np.sqrt(count / np.maximum(count - 1, 1)), 0.0)


def _roughness(tokens: np.ndarray, latency: np.ndarray) -> float:
    """Relative standard deviation of a point from the line through its two neighbours; 0 for fewer than three."""
    if len(tokens) < 3:
        return 0.0
    left, right = np.diff(tokens)[:-1], np.diff(tokens)[1:]
    weight = right / (left + right)  # of the left neighbour
    line = weight * latency[:-2] + (1 - weight) * latency[2:]
    deviation = np.abs(latency[1:-1] / line - 1) / np.sqrt(1 + weight**2 + (1 - weight) ** 2)
    near = (left == left.min()) & (right == left.min())
    return float(_MAD_TO_SD * np.median(deviation[near] if near.sum() >= _ENOUGH else deviation))
