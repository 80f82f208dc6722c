"""The order of the visits, what is repeated, and what is refined."""

from __future__ import annotations

import statistics

import pytest
from profiler.pretend import Device, flat, slope, staircase

from tokenprune_ext.profiler.journal import Records
from tokenprune_ext.profiler.points import MODEL, Point, points_of, stride_grid
from tokenprune_ext.profiler.series import build_series
from tokenprune_ext.profiler.sweep import Plan, sweep, warm_up

PLAN = Plan(rounds=3, visit_s=1e-9, noise_target=1.0, seed=0)


def test_grids() -> None:
    assert stride_grid(1, 5, 1) == (1, 2, 3, 4, 5)
    assert stride_grid(2, 16, 5) == (2, 6, 11, 16)  # dense is always there, and so is the least
    assert points_of(("a", "b"), (1, 4), (3, 2))[:3] == [Point("a", 1, 2), Point("a", 1, 3), Point("a", 4, 2)]


def test_every_round_visits_all_in_another_order() -> None:
    points = points_of((MODEL,), (1,), range(1, 21))
    device, again, other = Device(flat), Device(flat), Device(flat)
    sweep(device, Records(), points, PLAN)
    rounds = [device.order[i : i + 20] for i in range(0, 60, 20)]
    assert all(sorted(part) == points for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert points not in rounds
    sweep(again, Records(), points, PLAN)
    assert again.order == device.order
    sweep(other, Records(), points, Plan(3, 1e-9, 1.0, seed=1))
    assert other.order != device.order


def test_recorded_visits_are_not_made_again() -> None:
    points = points_of((MODEL,), (1,), range(1, 11))
    whole, records = Device(flat), Records()
    sweep(whole, records, points, PLAN)
    part = Records()
    for (point, number), times in list(records.visits.items())[:17]:
        part.add_visit(point, number, list(times))
    rest, seen = Device(flat), []
    sweep(rest, part, points, PLAN, on_visit=lambda done, needed: seen.append((done, needed)))
    assert rest.order == whole.order[17:]
    assert seen == [(done, 30) for done in range(18, 31)]
    assert list(part.visits) == list(records.visits)


class Restless(Device):
    """One point is far noisier than the others."""

    def prepare(self, point: Point):
        call = super().prepare(point)
        return lambda: call() * (1 + 0.5 * self.random.random() * (point.tokens == 7))


def test_noisy_points_are_visited_again_among_anchors() -> None:
    points = points_of((MODEL,), (1,), range(1, 41))
    device = Restless(flat, noise=1e-4)
    records = Records()
    sweep(device, records, points, Plan(3, 1e-9, 0.01, 0))
    extra = device.order[120:]
    assert extra.count(Point(MODEL, 1, 7)) == 3  # up to twice as often
    assert len(set(extra)) == 9  # and eight that say what is drift
    visits = dict(zip(range(1, 41), build_series(records.visits)[MODEL, 1].visits, strict=True))
    assert visits[7] == 6
    assert visits[8] == 3


def test_quiet_points_are_not() -> None:
    device = Device(flat, noise=1e-3)
    sweep(device, Records(), points_of((MODEL,), (1,), range(1, 41)), Plan(3, 1e-9, 0.01, 0))
    assert len(device.order) == 120


def finer(below: Point, above: Point) -> list[Point]:
    return [below._replace(tokens=n) for n in range(below.tokens + 1, above.tokens)]


def test_coarse_grids_are_refined_around_steps_only() -> None:
    points = points_of((MODEL,), (1,), stride_grid(4, 196, 8))
    device, records = Device(staircase, noise=1e-3), Records()
    sweep(device, records, points, PLAN, finer=finer)
    tokens = build_series(records.visits)[MODEL, 1].tokens
    for step in range(32, 193, 32):
        assert {step - 3, step, step + 1, step + 3} <= set(tokens)
    assert not {n for n in range(101, 124) if n % 8 != 4} & set(tokens)
    second = device.order[3 * len(points) :]
    assert set(points) <= set(second)  # the first points are among the others, so that no drift sets them apart

    smooth, records = Device(slope, noise=1e-3), Records()
    sweep(smooth, records, points, PLAN, finer=finer)
    assert build_series(records.visits)[MODEL, 1].tokens == tuple(point.tokens for point in points)


def test_warm_up_ends_when_the_latency_settles() -> None:
    device = Device(lambda tokens: 0.01 * (1 + 2.0 * max(0, 50 - device.made) / 50))
    assert warm_up(device, Point(MODEL, 1, 5))
    assert 50 < device.made < 80
    assert not warm_up(Device(flat, drift=10.0, calls=100), Point(MODEL, 1, 5))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_series_are_told_apart(batch_size: int) -> None:
    records = Records()
    points = points_of((MODEL, "block 0"), (1, 2), range(1, 11))
    sweep(Device(slope), records, points, PLAN)
    found = build_series(records.visits)
    assert list(found) == [("block 0", 1), ("block 0", 2), (MODEL, 1), (MODEL, 2)]
    assert found[MODEL, batch_size].latency == pytest.approx({n: slope(n) for n in range(1, 11)})
    assert statistics.median(found[MODEL, batch_size].visits) == 3
