"""Steps of a latency series that stand out from its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .series import Series

_SIGNIFICANT = 4.5  # standard errors; every place of a series is a candidate, so that 2 would be found in pure noise
_PARAMETERS = 3  # a segment adds its place, its height and its slope
_SHORTEST = 4  # points of a segment
_WINDOW = 16  # points on each side that say how high a step is


@dataclass(frozen=True)
class Step:
    """A jump of the latency between two neighbouring token counts.

    Attributes:
        below, above: the counts on both sides; the jump is between them.
        jump_s: latency above minus below, in seconds; negative where more tokens are faster.
        relative: the jump over the latency below.
        errors: the jump over its standard error.
    """

    below: int
    above: int
    jump_s: float
    relative: float
    errors: float


def need_ruptures() -> Any:
    """The change-point library.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import ruptures
    except ImportError as error:
        raise ImportError(
            "steps are found with the library ruptures, which is not installed: pip install 'tokenprune[profiler]'"
        ) from error
    return ruptures


def find_steps(series: Series, *, noise: float | None = None) -> tuple[Step, ...]:
    """Steps beyond the noise, from few tokens to many.

    Change points of a piecewise linear model of latency over tokens, by PELT with a Schwarz (BIC) penalty at the noise
    of the series; so a slope is no staircase. Of these, the ones where lines through up to 16 points on each side are
    4.5 standard errors apart.

    Args:
        series: at least eight points, else there are no steps to tell from noise.
        noise: relative standard error of a point; the series' own by default.

    Raises:
        ImportError: ruptures is not installed.

    Source: Killick, Fearnhead, Eckley, "Optimal detection of changepoints with a linear computational cost", 2012.
    """
    ruptures = need_ruptures()
    tokens, latency = np.array(series.tokens, dtype=float), np.array(series.median_s)
    if len(tokens) < 2 * _SHORTEST:
        return ()
    noise = max(series.noise if noise is None else noise, 1e-6)  # a clock that never differs still has a resolution
    sigma = noise * latency
    # Rows over their own sigma: weighted least squares, in units of the noise.
    signal = np.column_stack([latency, tokens / tokens[-1], np.ones_like(tokens)]) / sigma[:, None]
    penalty = _PARAMETERS * math.log(len(tokens))
    ends = ruptures.Pelt(model="linear", min_size=_SHORTEST, jump=1).fit(signal).predict(pen=penalty)
    bounds = [0, *ends]
    steps = []
    for start, place, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        step = _step(tokens, latency, sigma, max(start, place - _WINDOW), place, min(end, place + _WINDOW))
        if abs(step.errors) >= _SIGNIFICANT:
            steps.append(step)
    return tuple(steps)


def verdict(series: Series, steps: Sequence[Step]) -> str:
    """Whether the series is a staircase, in words."""
    noise = f"the noise ({100 * series.noise:.2g} % of the latency)"
    if not steps:
        return f"no steps beyond {noise}"
    falling = sum(step.jump_s < 0 for step in steps)
    text = f"{len(steps)} step{'s' if len(steps) > 1 else ''} beyond {noise}"
    return f"{text}, {falling} of them down: more tokens are faster there" if falling else text


def _step(tokens: np.ndarray, latency: np.ndarray, sigma: np.ndarray, start: int, place: int, end: int) -> Step:
    """The jump in front of index ``place``, between lines through the points from ``start`` and up to ``end``."""
    middle = (tokens[place - 1] + tokens[place]) / 2
    low, low_variance = _line_at(middle, tokens[start:place], latency[start:place], sigma[start:place])
    high, high_variance = _line_at(middle, tokens[place:end], latency[place:end], sigma[place:end])
    jump = high - low
    return Step(
        below=int(tokens[place - 1]),
        above=int(tokens[place]),
        jump_s=jump,
        relative=jump / low,
        errors=jump / math.sqrt(low_variance + high_variance),
    )


def _line_at(place: float, tokens: np.ndarray, latency: np.ndarray, sigma: np.ndarray) -> tuple[float, float]:
    """Value and variance at a place of the weighted least-squares line."""
    design = np.column_stack([np.ones_like(tokens), tokens - place]) / sigma[:, None]
    covariance = np.linalg.inv(design.T @ design)
    return float((covariance @ design.T @ (latency / sigma))[0]), float(covariance[0, 0])


def crossings(series: Series, *, errors: float = 4.0) -> list[tuple[int, int]]:
    """Neighbouring counts between which the latency changes otherwise than between most: where to look closer.

    The change a token is compared with the median over all neighbours, at the noise of the visits.
    """
    tokens, latency = np.array(series.tokens, dtype=float), np.array(series.median_s)
    if len(tokens) < 3:
        return list(zip(series.tokens, series.tokens[1:], strict=False))
    gap = np.diff(tokens)
    change = np.diff(latency)
    typical = np.median(change / gap) * gap
    error = np.median(series.se) * np.hypot(latency[1:], latency[:-1])
    found = np.abs(change - typical) > errors * np.maximum(error, 1e-6 * latency[1:])
    return [(series.tokens[i], series.tokens[i + 1]) for i in np.flatnonzero(found)]
