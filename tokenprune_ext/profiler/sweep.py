"""Visit the points in random order, round by round, repeat the noisy ones, and look closer around steps."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenprune_ext.latency import Clock, time_in_turns

from .journal import Records
from .points import Point
from .series import build_series
from .steps import crossings

_ANCHORS = 8  # points that every round visits, so that drift can be told from the points
_WINDOW = 5  # calls of a warm-up window
_STEADY = 0.02  # relative difference of the last three windows' medians below which a device is warm
_MAX_WINDOWS = 30

OnVisit = Callable[[int, int], None]  # visits done, visits known to be needed


class Target(Protocol):
    """What is measured: a device with something to run on it, or a pretended one."""

    clock: Clock

    def prepare(self, point: Point) -> Callable[[], object]:
        """A call that can be repeated; valid until the next one is prepared."""


@dataclass(frozen=True)
class Plan:
    """How to visit points; see the fields of the same names of ``Settings``."""

    rounds: int
    visit_s: float
    noise_target: float
    seed: int


def warm_up(target: Target, point: Point) -> bool:
    """Call until the medians of the last three windows of five calls are within 2 % of each other.

    Returns:
        Whether that was reached within 30 windows.
    """
    call = target.prepare(point)
    medians: list[float] = []
    for _ in range(_MAX_WINDOWS):
        medians.append(statistics.median(target.clock(call) for _ in range(_WINDOW)))
        last = medians[-3:]
        if len(last) == 3 and max(last) <= (1 + _STEADY) * min(last):
            return True
    return False


def sweep(
    target: Target,
    records: Records,
    points: Sequence[Point],
    plan: Plan,
    *,
    finer: Callable[[Point, Point], Iterable[Point]] | None = None,
    on_visit: OnVisit = lambda done, needed: None,
) -> None:
    """Measure all points, and record every visit at once; visits that are recorded already are skipped.

    Args:
        target: what is measured.
        records: where visits go.
        points: what to visit in every round.
        plan: how.
        finer: the points between two neighbours, to be visited where the latency between them steps; the others are
            visited again among them. None to leave the points as they are.
        on_visit: called after each visit.
    """
    last = 0

    def visit(rounds: range, chosen: Sequence[Point]) -> None:
        nonlocal last
        missing = [(point, n) for n in rounds for point in _shuffled(chosen, plan.seed, n)]
        missing = [entry for entry in missing if entry not in records.visits]
        needed = len(records.visits) + len(missing)
        for point, number in missing:
            times = time_in_turns({"call": target.prepare(point)}, clock=target.clock, budget_s=plan.visit_s)
            records.add_visit(point, number, times["call"])
            on_visit(len(records.visits), needed)
        last = rounds.stop

    visit(range(plan.rounds), points)
    if finer is not None:
        added = _between(points, records, plan.rounds, finer)
        if added:
            points = [*points, *added]
            visit(range(last, last + plan.rounds), points)
    for number in range(last, last + plan.rounds):
        noisy = _noisy(points, records, number, plan.noise_target)
        if not noisy:
            break
        visit(range(number, number + 1), noisy)


def _shuffled(points: Sequence[Point], seed: int, number: int) -> list[Point]:
    """Another order in every round, so that neither drift nor a neighbour always meets the same point."""
    return random.Random(f"{seed} {number}").sample(sorted(points), len(points))


def _between(
    points: Collection[Point], records: Records, before: int, finer: Callable[[Point, Point], Iterable[Point]]
) -> list[Point]:
    known, added = set(points), set()
    for (kind, batch), series in build_series(records.visits, before=before).items():
        for below, above in crossings(series):
            added |= {*finer(Point(kind, batch, below), Point(kind, batch, above))} - known
    return sorted(added)


def _noisy(points: Collection[Point], records: Records, before: int, target: float) -> list[Point]:
    """Points whose latency is not known well enough, with anchors of their series among them; none when all are."""
    chosen: set[Point] = set()
    for (kind, batch), series in build_series(records.visits, before=before).items():
        own = [Point(kind, batch, tokens) for tokens in series.tokens]
        noisy = {point for point, error in zip(own, series.se, strict=True) if error > target} & set(points)
        if noisy:
            chosen |= noisy | {own[i * (len(own) - 1) // max(_ANCHORS - 1, 1)] for i in range(_ANCHORS)}
    return sorted(chosen & set(points))
