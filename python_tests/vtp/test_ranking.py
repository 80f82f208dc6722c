"""Which channels stay, against a slow definition."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tokenprune_ext import vtp
from tokenprune_ext.profiler.device import DeviceError

LARGE = {"a": 50, "b": 20, "c": 7, "d": 64}


def gates(sizes=LARGE, seed=0, values=7):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-values, values + 1, (size,), generator=generator) / values for name, size in sizes.items()
    }


def slow(gates, rate):
    """One by one: the best of every place, then the best of all; the earlier place and the lower index first."""
    places = list(gates)
    channels = [(-abs(float(g)), places.index(p), i) for p in places for i, g in enumerate(gates[p])]
    first = {p: min(c for c in channels if c[1] == p) for p in range(len(places))}
    rest = sorted(c for c in channels if c not in first.values())
    count = len(channels) - round(rate * len(channels))
    chosen = [*first.values(), *rest[: count - len(places)]]
    return {name: sorted(i for _, p, i in chosen if p == index) for index, name in enumerate(places)}


@pytest.mark.parametrize("rate", [0, 0.1, 0.25, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_one_threshold(rate, seed):
    ranking = vtp.Ranking(gates(seed=seed))
    kept = ranking.kept(ranking.at_rate(rate))
    assert {name: index.tolist() for name, index in kept.items()} == slow(gates(seed=seed), rate)
    assert ranking.widths(ranking.at_rate(rate)) == {name: len(index) for name, index in kept.items()}


def test_every_place_keeps_one():
    values = {"weak": torch.full((10,), 0.01), "strong": torch.ones(30)}
    ranking = vtp.Ranking(values)
    kept = ranking.kept(ranking.at_rate(0.5))
    assert kept["weak"].tolist() == [0]
    assert kept["strong"].tolist() == list(range(19))


def test_equal_gates():
    ranking = vtp.Ranking({"a": torch.ones(4), "b": -torch.ones(4)})
    assert ranking.widths(ranking.at_rate(0.5)) == {"a": 3, "b": 1}
    assert ranking.kept(ranking.at_rate(0.25))["b"].tolist() == [0, 1]


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_rates_outside(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        vtp.Ranking(gates()).at_rate(rate)


def test_a_rate_that_would_empty_a_place():
    ranking = vtp.Ranking(gates())
    with pytest.raises(ValueError, match=r"leaves 3 of 141 channels, and 4 have to stay.*largest rate is 0\.9716"):
        ranking.at_rate(0.98)
    assert set(ranking.widths(ranking.at_rate(0.9716)).values()) == {1}
    with pytest.raises(ValueError, match="31 have to stay: 8 at each of 4 places"):
        vtp.Ranking(gates(), align=8).at_rate(0.9)


@pytest.mark.parametrize("align", [8, 16, 64])
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6])
def test_aligned_widths(align, rate):
    sizes = {"a": 192, "b": 192, "c": 192, "d": 768}
    values = gates(sizes, values=1000)
    ranking = vtp.Ranking(values, align)
    widths = ranking.widths(ranking.at_rate(rate))
    assert all(width % align == 0 for width in widths.values())
    assert abs(sum(widths.values()) - (1 - rate) * 1344) <= align / 2
    kept = ranking.kept(ranking.at_rate(rate))
    means = {}
    for name, gate in values.items():  # the best channels of a place, in groups that all beat those that went
        order = gate.abs().argsort(descending=True, stable=True)
        assert torch.equal(kept[name], order[: widths[name]].sort().values)
        means[name] = gate.abs()[order].unflatten(0, (-1, align)).mean(1)
    stay = min(float(means[name][width // align - 1]) for name, width in widths.items() if width > align)
    went = max(float(means[name][width // align]) for name, width in widths.items() if width < sizes[name])
    assert stay >= went


def test_a_width_that_is_no_multiple_stays_whole_or_loses_its_rest_first():
    ranking = vtp.Ranking({"a": torch.linspace(1, 0.5, 10), "b": torch.linspace(0.4, 0.1, 10)}, align=8)
    assert ranking.widths(ranking.at_rate(0)) == {"a": 10, "b": 10}
    assert ranking.widths(ranking.at_rate(0.1)) == {"a": 10, "b": 8}
    assert ranking.totals.tolist() == [16, 18, 20]


def test_between_two_totals_more_stay():
    ranking = vtp.Ranking({"a": torch.linspace(1, 0.5, 8), "b": torch.linspace(0.4, 0.1, 8)}, align=4)
    assert ranking.totals[ranking.at_rate(6 / 16)].item() == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gates_that_are_not_finite(bad):
    values = gates()
    values["c"][3] = bad
    with pytest.raises(ValueError, match="gates of c are not finite"):
        vtp.Ranking(values)


@pytest.mark.parametrize("align", [0, -8, 8.0, True])
def test_bad_align(align):
    with pytest.raises((TypeError, ValueError), match="align must be"):
        vtp.Ranking(gates(), align)


def test_tile_of_a_device():
    assert vtp.tile_of("h200") == 64
    assert vtp.tile_of("TX2") == 32
    with pytest.raises(DeviceError, match="no device 'toaster'"):
        vtp.tile_of("toaster")


def test_a_device_without_tiles(tmp_path):
    file = tmp_path / "device.json"
    file.write_text(json.dumps({"like": "h200", "gemm_tiles": []}), "utf-8")
    with pytest.raises(DeviceError, match="gemm_tiles is empty"):
        vtp.tile_of(file)
