"""Tiles, waves and times of single kernels, by hand, and what must hold of any."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiler.paper_devices import tiny_device

from tokenprune_ext.profiler.device import AttentionTile, Tile, available, load_device
from tokenprune_ext.profiler.waves import attention, elementwise_s, linear, waves

COUNTS = st.integers(1, 10_000)


def test_a_product_by_hand():
    """10 x 5 times 5 x 20 in tiles of 4 x 8: 3 * 3 tiles, 4 at a time, 2 * 2 * 4 * 8 * 5 operations of a SM a wave."""
    found = linear(tiny_device(), "float16", "fc", 10, 20, 5)
    assert (found.name, found.tiles, found.waves, found.shape) == ("fc", 9, 3, (4, 8))
    assert found.seconds == pytest.approx(3 * 640 / 1e8)
    assert linear(tiny_device(), "float32", "fc", 10, 20, 5).seconds == pytest.approx(3 * 640 / 5e7)


def test_one_row_less_changes_nothing_until_a_wave_is_empty():
    seconds = [linear(tiny_device(), "float16", "fc", rows, 16, 5).seconds for rows in range(1, 18)]
    # Two tiles a row of tiles, four tiles a wave: a new wave every 8 rows.
    assert seconds == [seconds[0]] * 8 + [seconds[8]] * 8 + [seconds[16]]
    assert seconds[8] == pytest.approx(2 * seconds[0])


def test_a_share_of_the_rate():
    device = tiny_device(gemm_tiles=(Tile(4, 8, 2, rate=0.5),))
    assert linear(device, "float16", "fc", 10, 20, 5).seconds == pytest.approx(6 * 640 / 1e8)


def test_a_wave_waits_for_what_its_tiles_read():
    """1e6 bytes a second of L2; 4 tiles read (4 + 8) * 5 elements of 2 bytes."""
    device = tiny_device(l2_bytes_per_clock=1)
    assert linear(device, "float16", "fc", 10, 20, 5).seconds == pytest.approx(3 * 480 / 1e6)


def test_a_product_waits_for_its_weights():
    device = tiny_device(memory_bytes_per_s=1e3)
    assert linear(device, "float16", "fc", 10, 20, 5).seconds == pytest.approx(200 / 1e3)


def test_every_kernel_has_its_fixed_time():
    device = tiny_device(kernel_s=1.0)
    assert linear(device, "float16", "fc", 10, 20, 5).seconds == pytest.approx(1 + 3 * 640 / 1e8)
    assert elementwise_s(device, "float16", 3, 0) == 3.0
    slow = tiny_device(l2_bytes_per_clock=1)
    assert elementwise_s(slow, "float16", 0, 50) == pytest.approx(100e-6)


def test_the_fastest_shape_is_chosen_and_the_first_of_equals():
    """For 5 rows and 8 columns: two tiles of 4 x 8 in one wave, or one of 8 x 8, twice the work."""
    small, large = Tile(4, 8, 1), Tile(8, 8, 1)
    for tiles in ((small, large), (large, small)):
        assert linear(tiny_device(gemm_tiles=tiles), "float16", "fc", 5, 8, 5).shape == (4, 8)
    for tiles in ((Tile(4, 8, 1), Tile(8, 4, 1)), (Tile(8, 4, 1), Tile(4, 8, 1))):
        assert linear(tiny_device(gemm_tiles=tiles), "float16", "fc", 8, 8, 5).shape == (
            tiles[0].rows,
            tiles[0].columns,
        )


def test_attention_by_hand():
    """9 queries of 3 heads of 2 images in tiles of 4, against 16 keys for 9: 18 tiles, two at a time."""
    found = attention(tiny_device(), "float16", 2, 3, 5, 9)
    assert (found.name, found.tiles, found.waves) == ("attention", 18, 9)
    assert found.seconds == pytest.approx(9 * 4 * 4 * 16 * 5 / 1e8)
    slow = tiny_device(l2_bytes_per_clock=1, attention_tile=AttentionTile(4, 8, 2))
    # Two tiles a SM: four read 4 queries, write as many, and read 16 keys and values, of 5 channels of 2 bytes.
    assert attention(slow, "float16", 2, 3, 5, 9).seconds == pytest.approx(5 * 4 * 400 / 1e6)


@given(tiles=COUNTS, sms=st.integers(1, 200), blocks=st.integers(1, 8), more=st.integers(1, 50))
def test_more_multiprocessors_or_blocks_never_take_more_waves(tiles, sms, blocks, more):
    assert waves(tiles, sms + more, blocks) <= waves(tiles, sms, blocks)
    assert waves(tiles, sms, blocks + more) <= waves(tiles, sms, blocks)
    assert (waves(tiles, sms, blocks) - 1) * sms * blocks < tiles <= waves(tiles, sms, blocks) * sms * blocks


@settings(deadline=None)
@given(rows=COUNTS, columns=COUNTS, inner=COUNTS, more=st.integers(1, 100), name=st.sampled_from(available()))
def test_more_work_never_takes_less_time(rows, columns, inner, more, name):
    device = load_device(name)
    least = linear(device, "float16", "fc", rows, columns, inner).seconds
    assert least <= linear(device, "float16", "fc", rows + more, columns, inner).seconds
    assert least <= linear(device, "float16", "fc", rows, columns + more, inner).seconds
    assert least <= linear(device, "float16", "fc", rows, columns, inner + more).seconds
    # Nothing is faster than the peak.
    assert least >= 2 * rows * columns * inner / (device.num_sms * device.flop_per_s("float16"))


@settings(deadline=None)
@given(rows=COUNTS, columns=COUNTS, sms=st.integers(1, 100), more=st.integers(1, 100))
def test_more_multiprocessors_never_take_more_time(rows, columns, sms, more):
    few, many = (tiny_device(num_sms=count) for count in (sms, sms + more))
    assert (
        linear(many, "float16", "fc", rows, columns, 64).seconds
        <= linear(few, "float16", "fc", rows, columns, 64).seconds
    )
