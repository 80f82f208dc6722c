"""Pruning to a latency, on a made-up clock."""

from __future__ import annotations

import pytest
import torch
from host_models import make_host, snapshot
from vtp.gated_models import gated_host, images_for

from tokenprune_ext import UnsupportedModelError, vtp
from tokenprune_ext.vtp.width_table import Surface

PLANE = Surface((1, 16, 32), (1, 32), ((2.0, 64.0), (17.0, 79.0), (33.0, 95.0)))  # first + 2 * second - 1


def pretend(call):
    """A clock on which a weight takes a second, and the rest of a model 1000."""
    if hasattr(call.func, "parameters"):
        return 1000.0 + sum(_weights(block) for block in call.func.blocks)
    return float(_weights(call.args[0], call.func.__name__.removeprefix("_").replace("attention", "attn")))


def _weights(block, half=""):
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return sum(block.get_submodule(name).weight.numel() for name in names if name.startswith(half))


def table(model, **options):
    return vtp.measure_widths(model, images_for(model), budget_s=0, clock=pretend, **options)


def as_fast(model, share, **options):
    options = {"table": table(model), "clock": pretend} | options
    return vtp.prune_to_latency(model, share, images_for(model), budget_s=0, **options)


@pytest.mark.parametrize(("at", "seconds"), [((1, 1), 2), ((32, 32), 95), ((24, 1), 25), ((8, 20), 47), ((40, 99), 95)])
def test_between_the_measured_widths(at, seconds):
    assert PLANE(*at) == pytest.approx(seconds)


def test_a_table_of_the_whole_model():
    model = gated_host()
    before = snapshot(model)
    found = table(model)
    assert snapshot(model) == before
    assert found.attention.first == found.attention.second == found.mlp.first == (1, 8, 16, 24, 32)
    assert found.mlp.second == (1, 32, 64, 96, 128)
    assert found.outside_s == 1000
    # Weights are linear in each width, as the table is between its points.
    for rate in (0, 0.3, 0.8):
        smaller = vtp.prune(model, rate)
        expected = 1000 + sum(map(_weights, smaller.blocks))
        assert found.estimate(vtp.widths_of(smaller)) == pytest.approx(expected)


def test_aligned_widths_are_the_measured_ones():
    found = table(gated_host(), points=3, align=8)
    assert found.attention.first == (8, 16, 24, 32)
    assert found.mlp.second == (8, 48, 88, 128)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("share", [1, 0.8, 0.6])
def test_as_fast_as_wanted(share, align):
    model = gated_host()
    found = as_fast(model, share, align=align)
    smaller = found.model
    seconds, dense = (1000 + sum(map(_weights, each.blocks)) for each in (smaller, make_host("deit")))
    assert share - 0.02 * align**0.5 <= seconds / dense <= share
    assert found.measured == pytest.approx(seconds / dense)
    assert found.estimated == pytest.approx(seconds / dense)
    assert all(width % align == 0 for block in vtp.widths_of(smaller) for width in block)


def test_channels_go_in_the_order_of_a_rate():
    model = gated_host()
    widths = vtp.widths_of(as_fast(model, 0.7).model)
    rate = 1 - sum(map(sum, widths)) / (4 * 7 * 32)
    assert vtp.widths_of(vtp.prune(model, rate)) == widths


@pytest.mark.parametrize("share", [0.85, 0.7])
def test_an_estimate_that_is_off_is_corrected(share):
    """On this clock channels save less than the table says."""
    model = gated_host()

    def slower(call):
        seconds = pretend(call)
        dense = 1000.0 + sum(map(_weights, make_host("deit").blocks))
        return dense * (seconds / dense) ** 0.5

    found = as_fast(model, share, clock=slower)
    assert share - 0.021 <= found.measured <= share
    assert found.estimated == pytest.approx(found.measured**2, abs=0.01)
    assert found.model.training == model.training


def test_never_slower_than_asked():
    """Here whatever was removed, the time stays."""
    model = gated_host()
    with pytest.raises(
        ValueError, match=r"share 0\.9 is not reached: \d models were tried, and the fastest takes 1\.0"
    ):
        as_fast(model, 0.9, clock=lambda call: 1.0)


def test_out_of_reach():
    model = gated_host()
    with pytest.raises(ValueError, match=r"share 0\.01 is out of reach: the narrowest model takes 0\.\d+"):
        as_fast(model, 0.01)
    for share in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            as_fast(model, share)
    with pytest.raises(ValueError, match="no gates"):
        as_fast(make_host("deit"), 0.5, table=table(model))


def test_measured_on_this_machine():
    model = gated_host()
    found = vtp.measure_widths(model, images_for(model), points=1, budget_s=0)
    assert all(seconds > 0 for half in (found.attention, found.mlp) for row in half.seconds for seconds in row)
    smaller = vtp.prune_to_latency(model, 1, images_for(model), table=found)
    assert torch.isfinite(smaller.model(images_for(model))).all()
    assert smaller.measured == 1


def test_blocks_that_differ():
    model = gated_host()
    with pytest.raises(UnsupportedModelError, match="blocks that are alike"):
        vtp.measure_widths(vtp.prune(model, 0.5), images_for(model))
