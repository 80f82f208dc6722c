"""Descriptions of devices: those that are shipped, a user's own, and what is wrong with one."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from profiler.paper_devices import tiny_device

from tokenprune_ext.profiler.device import DEVICES, Device, DeviceError, Tile, available, load_device

TERA = 1e12


def described(**changes: Any) -> dict[str, Any]:
    """The description of the A100, changed; a value of None leaves the field out."""
    found = {**json.loads((DEVICES / "a100.json").read_text()), **changes}
    return {key: value for key, value in found.items() if value is not None}


def written(path: Path, content: object) -> Path:
    path = path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", available())
def test_every_figure_has_a_source(name):
    device = load_device(name)
    assert {field.name for field in fields(Device)} - {"name", "sources"} == device.sources.keys()
    assert all(device.sources.values())


@pytest.mark.parametrize(
    ("name", "dtype", "tera", "bandwidth"),
    [
        ("a100", "float16", 312, 2.039),
        ("a100", "tf32", 156, 2.039),
        ("a100", "float32", 19.5, 2.039),
        ("a100-40gb", "bfloat16", 312, 1.555),
        ("orin", "float16", 42.5, 0.2048),
        ("orin", "float32", 5.3, 0.2048),
        ("tx2", "float16", 1.33, 0.0597),
        ("h100", "float16", 989.4, 3.35),
        ("h100", "tf32", 494.7, 3.35),
        ("h200", "float16", 989.4, 4.8),
    ],
)
def test_rates_are_those_of_the_data_sheets(name, dtype, tera, bandwidth):
    device = load_device(name)
    assert device.num_sms * device.flop_per_s(dtype) == pytest.approx(tera * TERA, rel=0.01)
    assert device.memory_bytes_per_s == pytest.approx(bandwidth * TERA)


def test_names_in_any_case_and_files(tmp_path):
    assert load_device("A100") == load_device("a100") == load_device(written(tmp_path, described()))


def test_like_another_device(tmp_path):
    device = load_device(written(tmp_path, {"like": "A100", "name": "slow", "clock_hz": 1e9}))
    a100 = load_device("a100")
    assert (device.name, device.clock_hz) == ("slow", 1e9)
    assert (device.num_sms, device.gemm_tiles, device.sources) == (a100.num_sms, a100.gemm_tiles, a100.sources)
    assert load_device("h200").sources["memory_bytes_per_s"] != load_device("h100").sources["memory_bytes_per_s"]


TILE = {"rows": 128, "columns": 128, "blocks_per_sm": 2}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (described(num_sms=None), "mine.json: missing num_sms"),
        (described(gemm_tiles=None), "missing gemm_tiles"),
        (described(gemm_tiles=[]), "gemm_tiles is empty"),
        (described(gemm_tiles=7), "gemm_tiles must be a list"),
        (described(gemm_tiles=[{"rows": 128, "columns": 64}]), "gemm_tiles: missing blocks_per_sm"),
        (described(gemm_tiles=[{**TILE, "depth": 3}]), "gemm_tiles: unknown depth"),
        (described(gemm_tiles=[{**TILE, "rows": 0}]), "rows must be a whole number from 1 on, got 0"),
        (described(gemm_tiles=[{**TILE, "rate": 1.5}]), "rate is a share of the peak, got 1.5"),
        (described(gemm_tiles=[{**TILE, "blocks_per_sm": 5}]), "5 blocks of 128 x 128 need at least 81920 registers"),
        (described(shared_per_sm=1000), "bytes of shared memory"),
        (described(threads_per_sm=64), "threads"),
        (described(attention_tile={"queries": 64}), "attention_tile: missing blocks_per_sm, keys"),
        (described(attention_tile=None), "missing attention_tile"),
        (described(attention_tile=3), "attention_tile: expected an object, got 3"),
        (described(sms=108), "unknown sms"),
        (described(num_sms=108.5), "num_sms must be a whole number"),
        (described(num_sms=True), "num_sms must be a whole number"),
        (described(clock_hz=0), "clock_hz must be a number above 0, got 0"),
        (described(clock_hz="fast"), "clock_hz must be a number above 0"),
        (described(flop_per_clock={}), "flop_per_clock must map dtypes"),
        (described(flop_per_clock={"int3": 5}), "got int3: 5"),
        (described(flop_per_clock={"float16": 0}), "got float16: 0"),
        ({"like": "b100"}, "like: no device 'b100'; devices: a100"),
        ([1], "expected an object"),
        ("{", "not readable as JSON"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, said):
    with pytest.raises(DeviceError, match=said):
        load_device(written(tmp_path, content))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DeviceError, match=r"no device 'v100' and no such file; devices: a100, a100-40gb, h100"):
        load_device("v100")


def test_a_dtype_without_a_rate():
    with pytest.raises(DeviceError, match="Jetson TX2 has no rate for bfloat16; it has: float16, float32"):
        load_device("tx2").flop_per_s("bfloat16")


def test_traffic_beyond_the_cache():
    device = tiny_device(
        l2_bytes=100, l2_bytes_per_clock=1, memory_bytes_per_s=1e3
    )  # 1e6 bytes a second from the cache
    assert device.traffic_s(50) == pytest.approx(50e-6)
    assert device.traffic_s(300) == pytest.approx(100e-6 + 200e-3)


def test_a_tile_that_just_fits():
    tiny_device(gemm_tiles=(Tile(128, 128, 4),), shared_per_sm=4 * 64 * 256)
    with pytest.raises(DeviceError):
        tiny_device(gemm_tiles=(Tile(128, 128, 4),), shared_per_sm=4 * 64 * 256 - 1)
