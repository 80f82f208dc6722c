"""Latency estimated from parts: by hand, and on a made-up machine whose parts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from host_models import make_host

from tokenprune_ext import Schedule, methods
from tokenprune_ext.cli import main
from tokenprune_ext.loading import load_model
from tokenprune_ext.macs import block_costs
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.profiler import BlockTable
from tokenprune_ext.search import latency
from tokenprune_ext.search.latency import LatencyShare, Overhead
from tokenprune_ext.search.space import Space

TABLE = BlockTable(
    batch_size=2,
    num_patches=16,
    tokens=(1, 16),
    kinds=("block 0",) * 4,
    seconds={"block 0": (1.0, 16.0)},  # a second a patch
    device="none",
    dtype="float32",
)


def test_by_hand():
    """Zero-TPrune prunes behind a block; Top-K before its MLP, which saves the MLP's share of the block's MACs."""
    model = make_host("vit")
    cost = LatencyShare(model, TABLE, Overhead(outside_s=6.0, layer_s=0.5, token_s=0.25))
    dense = 6 + 4 * 16
    assert cost({}, methods.create("dense")) == 1.0
    behind = methods.create("zero_tprune")
    assert cost({1: 8}, behind) == pytest.approx((6 + 16 + 16 + 8 + 8 + 0.5 + 16 * 0.25) / dense)
    assert cost({1: 8, 2: 4}, behind) == pytest.approx((6 + 16 + 16 + 8 + 4 + 2 * 0.5 + 24 * 0.25) / dense)
    block = block_costs(model)[1]
    left = block.macs(17, 9) / block.macs(17, 17)
    assert 0 < left < 1
    assert cost({1: 8}, methods.create("topk")) == pytest.approx((6 + 16 + 16 * left + 16 + 0.5 + 4) / dense)
    alone = methods.create("dense", class_token_only=True)
    assert cost({}, alone) == pytest.approx((6 + 3 * 16 + 16 * block.macs(17, 1, 1) / block.macs(17, 17)) / dense)


@pytest.mark.parametrize("overhead", [Overhead(6.0, 0.5, 0.25), Overhead(0.0, 2.0, 0.0), Overhead(1.0, 0.0, 0.0)])
def test_the_parts_of_a_known_machine_are_found(monkeypatch, overhead):
    model = make_host("vit", depth=12)
    table = BlockTable(**{**vars(TABLE), "kinds": ("block 0",) * 12})
    machine = LatencyShare(model, table, overhead)
    dense = overhead.outside_s + 12 * 16

    def measured(model, schedules, images, budget_s):
        return [dense, *(dense * machine(plan.keep, plan.build_method()) for plan in schedules)]

    monkeypatch.setattr(latency, "_latencies", measured)
    monkeypatch.setattr(latency, "block_latency", lambda model, batch_size: table)
    space = Space.of(model, methods.create("topk"))
    found = LatencyShare.measure(model, space, torch.zeros(2, 3, 64, 64), 0.0)
    assert vars(found.overhead) == pytest.approx(vars(overhead), abs=1e-9)


def test_what_would_be_negative_is_left_out():
    rows = np.array([(1.0, 0.0, 0.0), (1.0, 1.0, 16.0), (1.0, 2.0, 24.0), (1.0, 1.0, 8.0)])
    found = latency._least_squares(rows, rows @ np.array([2.0, 1.0, -0.01]))
    assert found[2] == 0.0
    assert min(found) >= 0
    assert latency._least_squares(rows, -rows[:, 0]) == [0.0, 0.0, 0.0]


def search(inputs, output, *args):
    command = ["search", "--model", "test_vit", "--img-size", "64", "--weights", inputs / "w.safetensors"]
    command += ["--data", inputs / "images.tsv", "--method", "topk", "--trials", "6", "--batch-size", "4"]
    return CliRunner().invoke(main, [*map(str, command), "--latency-seconds", "0.2", "--output", str(output), *args])


def test_a_budget_of_latency(inputs, tmp_path):
    model = load_model("test_vit", weights=inputs / "w.safetensors", img_size=64)
    table = BlockTable(**{**vars(TABLE), "kinds": ("block 0",) * inspect_host(model).depth})
    LatencyShare(model, table, Overhead(6.0, 0.5, 0.25)).save(tmp_path / "latency.json")
    before = (tmp_path / "latency.json").read_text()
    result = search(inputs, tmp_path, "--budget-latency=-20%")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "search.json").read_text())
    (measured,) = found["measured"]
    assert f"estimated {found['best'][0]['cost']:.1%}, measured {measured:.1%}" in result.output
    assert 0.7 < found["best"][0]["cost"] <= 0.8
    assert Schedule.load(tmp_path / "schedule-0.8.json").origin["device"] == found["device"]
    assert (tmp_path / "latency.json").read_text() == before  # the costs of earlier trials stay what they were


def test_a_new_search_measures(inputs, tmp_path, memory_kept):
    result = search(inputs, tmp_path, "--budget-latency", "1.0")  # whatever this machine is like
    assert result.exit_code == 0, result.output
    assert "measuring the latency" in result.output
    assert memory_kept
    model = load_model("test_vit", weights=inputs / "w.safetensors", img_size=64)
    found = LatencyShare.load(tmp_path / "latency.json", model)
    assert found({}, methods.create("dense")) == 1.0
    assert found.table.num_patches == 16
    assert min(found.table.seconds["block 0"]) > 0
