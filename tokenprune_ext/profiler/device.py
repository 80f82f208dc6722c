"""A GPU as the wave model sees it: a small JSON file of public figures, one for each device in ``devices/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

DEVICES = Path(__file__).parent / "devices"
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}
_REGISTERS_OF_A_THREAD = 255
_WARP = 32


class DeviceError(ValueError):
    """A description of a device that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Tile:
    """The part of a product that one block of threads computes.

    Attributes:
        rows: tokens of the tile.
        columns: output channels of the tile.
        blocks_per_sm: how many such blocks a multiprocessor holds at a time.
        rate: share of the multiprocessor's peak that they reach together, in (0, 1].
    """

    rows: int
    columns: int
    blocks_per_sm: int
    rate: float = 1.0

    def __post_init__(self) -> None:
        _whole(self, "rows", "columns", "blocks_per_sm")
        _positive(self, "rate")
        if self.rate > 1:
            raise DeviceError(f"rate is a share of the peak, got {self.rate}")


@dataclass(frozen=True)
class AttentionTile:
    """What one block of a fused attention kernel computes: so many queries of one head, against all keys.

    Attributes:
        queries: queries of a block.
        keys: the number of keys is rounded up to a multiple of this.
        blocks_per_sm: how many such blocks a multiprocessor holds at a time.
        rate: share of the multiprocessor's peak that they reach together, in (0, 1].
    """

    queries: int
    keys: int
    blocks_per_sm: int
    rate: float = 1.0

    def __post_init__(self) -> None:
        _whole(self, "queries", "keys", "blocks_per_sm")
        _positive(self, "rate")


@dataclass(frozen=True)
class Device:
    """A described GPU.

    Attributes:
        name: what to call it.
        num_sms: multiprocessors.
        clock_hz: clock under load.
        registers_per_sm: 32-bit registers of a multiprocessor.
        shared_per_sm: bytes of shared memory of a multiprocessor.
        threads_per_sm: threads that a multiprocessor holds.
        flop_per_clock: dtype -> operations of a multiprocessor in a clock; a multiply-add is two.
        memory_bytes_per_s: bandwidth of the device memory.
        l2_bytes: size of the L2 cache.
        l2_bytes_per_clock: bytes that the L2 cache delivers in a clock.
        kernel_s: what every kernel takes however little it does, in seconds.
        gemm_tiles: shapes of tile that the library chooses among.
        attention_tile: of the fused attention kernel.
        sources: field -> where its figure is from, or that it is an assumption.
    """

    name: str
    num_sms: int
    clock_hz: float
    registers_per_sm: int
    shared_per_sm: int
    threads_per_sm: int
    flop_per_clock: Mapping[str, float]
    memory_bytes_per_s: float
    l2_bytes: int
    l2_bytes_per_clock: float
    kernel_s: float
    gemm_tiles: tuple[Tile, ...]
    attention_tile: AttentionTile
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _whole(self, "num_sms", "registers_per_sm", "shared_per_sm", "threads_per_sm", "l2_bytes")
        _positive(self, "clock_hz", "memory_bytes_per_s", "l2_bytes_per_clock", "kernel_s")
        if not isinstance(self.flop_per_clock, Mapping) or not self.flop_per_clock:
            raise DeviceError("flop_per_clock must map dtypes to operations in a clock")
        for dtype, rate in self.flop_per_clock.items():
            if dtype not in ELEMENT_BYTES or not _is_number(rate) or rate <= 0:
                raise DeviceError(
                    f"flop_per_clock: expected {', '.join(ELEMENT_BYTES)}, each above 0; got {dtype}: {rate}"
                )
        if not self.gemm_tiles:
            raise DeviceError("gemm_tiles is empty: it needs at least one tile shape that the library uses")
        for tile in self.gemm_tiles:
            self._check_fits(tile)

    def flop_per_s(self, dtype: str) -> float:
        """Peak of one multiprocessor. Raises DeviceError for a dtype whose rate is not described."""
        if dtype not in self.flop_per_clock:
            raise DeviceError(f"{self.name} has no rate for {dtype}; it has: {', '.join(self.flop_per_clock)}")
        return self.flop_per_clock[dtype] * self.clock_hz

    def traffic_s(self, bytes_moved: float) -> float:
        """Time to move activations: the L2 cache delivers what fits into it, the memory the rest."""
        in_cache = min(bytes_moved, self.l2_bytes)
        return in_cache / self.l2_bytes_per_s + (bytes_moved - in_cache) / self.memory_bytes_per_s

    @property
    def l2_bytes_per_s(self) -> float:
        """Bandwidth of the L2 cache."""
        return self.l2_bytes_per_clock * self.clock_hz

    def _check_fits(self, tile: Tile) -> None:
        """At the least, an accumulator of every output and two slices of 8 of both factors have to fit."""
        outputs = tile.rows * tile.columns
        warps = -(-outputs // (_REGISTERS_OF_A_THREAD * _WARP))
        for what, needed, there in (
            ("registers", outputs, self.registers_per_sm),
            ("bytes of shared memory", 2 * 8 * 4 * (tile.rows + tile.columns), self.shared_per_sm),
            ("threads", warps * _WARP, self.threads_per_sm),
        ):
            if tile.blocks_per_sm * needed > there:
                raise DeviceError(
                    f"{tile.blocks_per_sm} blocks of {tile.rows} x {tile.columns} need at least "
                    f"{tile.blocks_per_sm * needed} {what}; a multiprocessor of {self.name} has {there}"
                )


def available() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    return tuple(sorted(path.stem for path in DEVICES.glob("*.json")))


def load_device(name: str | Path) -> Device:
    """A device by its name (case does not matter) or from a JSON file.

    The file has the fields of :class:`Device`. With ``"like": NAME`` it has only what differs from that device.

    Raises:
        DeviceError: no such device or file, or a field that is missing, unknown or out of range.
    """
    path = _path(name)
    try:
        return _build(_read(path))
    except DeviceError as error:
        raise DeviceError(f"{path.name}: {error}") from error


def _path(name: str | Path) -> Path:
    known = DEVICES / f"{str(name).lower()}.json"
    if known.is_file():
        return known
    if Path(name).is_file():
        return Path(name)
    raise DeviceError(f"no device {str(name)!r} and no such file; devices: {', '.join(available())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceError(f"not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise DeviceError("expected an object with the fields of a device")
    like = found.pop("like", None)
    if like is None:
        return found
    if not isinstance(like, str) or like.lower() not in available():
        raise DeviceError(f"like: no device {like!r}; devices: {', '.join(available())}")
    base = _read(DEVICES / f"{like.lower()}.json")
    return {**base, **found, "sources": {**base["sources"], **found.get("sources", {})}}


def _build(found: dict[str, Any]) -> Device:
    given = _check_fields(Device, found)
    if not isinstance(given["gemm_tiles"], list):
        raise DeviceError("gemm_tiles must be a list of tile shapes")
    tiles = tuple(Tile(**_check_fields(Tile, tile, "gemm_tiles: ")) for tile in given["gemm_tiles"])
    attention = AttentionTile(**_check_fields(AttentionTile, given["attention_tile"], "attention_tile: "))
    return Device(**{**given, "gemm_tiles": tiles, "attention_tile": attention})


def _check_fields(kind: Any, found: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DeviceError(f"{where}expected an object, got {found!r}")
    known = {entry.name for entry in fields(kind)}
    needed = {e.name for e in fields(kind) if e.default is MISSING and e.default_factory is MISSING}
    for problem, names in (("missing", needed - found.keys()), ("unknown", found.keys() - known)):
        if names:
            raise DeviceError(f"{where}{problem} {', '.join(sorted(names))}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DeviceError(f"{name} must be a whole number from 1 on, got {value!r}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_number(value) or not value > 0:
            raise DeviceError(f"{name} must be a number above 0, got {value!r}")
