"""Kernels in waves: how long a product of matrices takes on a described device.

A product is cut into tiles, one block of threads each; the device holds a number of blocks at a time, a wave, and the
last wave takes as long as a full one. The library is taken to choose the shape of tile that is fastest by this model.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import ELEMENT_BYTES, Device, Tile


@dataclass(frozen=True)
class Kernel:
    """One kernel on paper.

    Attributes:
        name: of the linear layer, or ``attention``.
        tiles: blocks of the grid.
        waves: how often the device has to be filled.
        seconds: predicted time.
        shape: rows and columns of a tile.
    """

    name: str
    tiles: int
    waves: int
    seconds: float
    shape: tuple[int, int]


def waves(tiles: int, num_sms: int, blocks_per_sm: int) -> int:
    """How often a device has to be filled to run so many blocks."""
    return -(-tiles // (num_sms * blocks_per_sm))


def linear(device: Device, dtype: str, name: str, rows: int, columns: int, inner: int) -> Kernel:
    """``rows x inner`` times the weights, ``inner x columns``, in the fastest shape of tile.

    Of equally fast shapes the first of the device's list is taken.
    """
    return min((_linear(device, dtype, name, tile, rows, columns, inner) for tile in device.gemm_tiles), key=_seconds)


def _linear(device: Device, dtype: str, name: str, tile: Tile, rows: int, columns: int, inner: int) -> Kernel:
    size = ELEMENT_BYTES[dtype]
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    count = waves(tiles, device.num_sms, tile.blocks_per_sm)
    flop = 2 * tile.rows * tile.columns * inner
    read = (tile.rows + tile.columns) * inner * size
    filled = count * _wave_s(device, dtype, tile.blocks_per_sm, flop / tile.rate, read)
    # Weights come from memory; what went in and out was just written, or is read next.
    moved = inner * columns * size / device.memory_bytes_per_s + device.traffic_s(rows * (inner + columns) * size)
    return Kernel(name, tiles, count, device.kernel_s + max(filled, moved), (tile.rows, tile.columns))


def attention(device: Device, dtype: str, images: int, heads: int, head_dim: int, tokens: int) -> Kernel:
    """A fused attention kernel: a block takes some queries of one head of one image and goes through all keys."""
    tile, size = device.attention_tile, ELEMENT_BYTES[dtype]
    keys = -(-tokens // tile.keys) * tile.keys
    tiles = images * heads * -(-tokens // tile.queries)
    count = waves(tiles, device.num_sms, tile.blocks_per_sm)
    flop = 4 * tile.queries * keys * head_dim
    read = (2 * tile.queries + 2 * keys) * head_dim * size
    filled = count * _wave_s(device, dtype, tile.blocks_per_sm, flop / tile.rate, read)
    moved = device.traffic_s(4 * images * tokens * heads * head_dim * size)
    return Kernel("attention", tiles, count, device.kernel_s + max(filled, moved), (tile.queries, tile.keys))


def elementwise_s(device: Device, dtype: str, kernels: int, elements: int) -> float:
    """Kernels that read and write so many elements together: norms, activations, residual sums."""
    return kernels * device.kernel_s + device.traffic_s(elements * ELEMENT_BYTES[dtype])


def _wave_s(device: Device, dtype: str, blocks_per_sm: int, flop: float, read: float) -> float:
    """A full wave of blocks that compute and read so much each: bounded by the SM's rate and by the L2 cache."""
    computing = blocks_per_sm * flop / device.flop_per_s(dtype)
    return max(computing, device.num_sms * blocks_per_sm * read / device.l2_bytes_per_s)


def _seconds(kernel: Kernel) -> float:
    return kernel.seconds
