"""Steps of pretended devices: those that are there are found, and nothing else is."""

from __future__ import annotations

import sys

import pytest
from profiler.pretend import Curve, Device, bump, flat, slope, staircase

from tokenprune_ext.profiler.journal import Records
from tokenprune_ext.profiler.points import MODEL, points_of
from tokenprune_ext.profiler.series import Series, build_series
from tokenprune_ext.profiler.steps import crossings, find_steps, verdict
from tokenprune_ext.profiler.sweep import Plan, sweep

COUNTS = range(4, 197)


def measured(curve: Curve, noise: float = 0.0, drift: float = 0.0, seed: int = 0, rounds: int = 5) -> Series:
    records = Records()
    points = points_of((MODEL,), (1,), COUNTS)
    device = Device(curve, noise, drift, calls=3 * rounds * len(points), seed=seed)
    sweep(device, records, points, Plan(rounds, 1e-9, 1.0, seed))
    return build_series(records.visits)[MODEL, 1]


def quadratic(tokens: int) -> float:
    """The multiply-accumulates of a block with 192 channels."""
    return 1e-9 * (12 * tokens * 192**2 + 2 * tokens**2 * 192) + 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("curve", [flat, slope, quadratic])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_has_no_steps_is_no_staircase(curve: Curve, noise: float, seed: int) -> None:
    series = measured(curve, noise, drift=0.3, seed=seed)
    steps = find_steps(series)
    assert steps == ()
    assert verdict(series, steps).startswith("no steps beyond the noise")


@pytest.mark.parametrize(("noise", "drift"), [(0.0, 0.0), (0.003, 0.0), (0.01, 0.3)])
def test_every_step_of_a_staircase_is_found(noise: float, drift: float) -> None:
    series = measured(staircase, noise, drift)
    steps = find_steps(series)
    assert [(step.below, step.above) for step in steps] == [(n, n + 1) for n in range(32, 193, 32)]
    for step in steps:
        assert step.jump_s == pytest.approx(1e-3 * (1 + drift / 2), rel=0.35)
        assert step.relative == pytest.approx(step.jump_s / series.latency[step.below], rel=0.1)
    assert verdict(series, steps).startswith("6 steps beyond the noise")


def test_a_bump_is_a_step_up_and_one_down() -> None:
    series = measured(bump, noise=0.01)
    up, down = find_steps(series)
    assert (up.below, up.above) == (59, 60)
    assert (down.below, down.above) == (89, 90)
    assert up.jump_s > 0 > down.jump_s
    assert "1 of them down: more tokens are faster there" in verdict(series, (up, down))


def test_steps_that_drown_in_noise_are_not_called_steps() -> None:
    series = measured(staircase, noise=0.5)
    assert series.noise > 0.1
    assert find_steps(series) == ()


def test_few_points_have_no_steps() -> None:
    series = Series(MODEL, 1, (1, 2, 3), (1.0, 1.0, 9.0), (1.0,) * 3, (1.0,) * 3, (0.0,) * 3, (5,) * 3, 0.001)
    assert find_steps(series) == ()


def test_noise_is_what_the_device_has() -> None:
    # the standard error of a median of 5 visits, each a median of 3 calls
    assert measured(flat, noise=0.02).noise == pytest.approx(1.2533 * 0.02 * 0.67 / 5**0.5, rel=0.3)
    assert measured(flat).noise == 0


def test_drift_is_no_property_of_a_point() -> None:
    still, drifting = measured(slope), measured(slope, drift=0.5)
    ratio = [b / a for a, b in zip(still.median_s, drifting.median_s, strict=True)]
    assert max(ratio) / min(ratio) < 1.02
    assert ratio[0] == pytest.approx(1.25, rel=0.05)  # as fast as the machine was on the whole


def test_quantiles_are_of_the_calls_as_timed() -> None:
    series = measured(flat, drift=0.5)
    assert series.q20_s[0] < series.q80_s[0]
    assert series.visits == (5,) * len(COUNTS)


def test_crossings_are_where_the_latency_changes_otherwise() -> None:
    def coarse(curve: Curve) -> list[tuple[int, int]]:
        full = measured(curve)
        keep = slice(0, None, 8)
        fields = (full.tokens, full.median_s, full.q20_s, full.q80_s, full.se, full.visits)
        tokens, *rest = (row[keep] for row in fields)
        return crossings(Series(MODEL, 1, tokens, *rest, full.noise))  # type: ignore[arg-type]

    assert coarse(staircase) == [(28, 36), (60, 68), (92, 100), (124, 132), (156, 164), (188, 196)]
    assert coarse(slope) == []
    assert coarse(bump) == [(52, 60), (84, 92)]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(ImportError, match=r"ruptures.*pip install 'tokenprune\[profiler\]'"):
        find_steps(measured(flat, rounds=3))
