"""From keep ratios, token counts or a cost target to the patch tokens that leave each layer."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from .macs import MacsShare
from .methods import Method
from .patch import Host


def checked_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Pruning layers as given by the user: block indices of a model of ``depth`` blocks, ascending."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of block indices, got {layers!r}")
    if not layers:
        raise ValueError("layers must name at least one block")
    for layer in layers:
        check_integral("layers", layer, 0)
        if layer >= depth:
            raise ValueError(f"layers has {layer}, but the model has layers 0..{depth - 1}")
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError(f"layers must be ascending without repeats, got {list(layers)}")
    return tuple(map(int, layers))


def counts_from_keep(
    keep: float | Sequence[float | int], layers: tuple[int, ...], num_patches: int, method: Method
) -> dict[int, int]:
    """Patch tokens leaving each layer, from one ratio for all or one ratio or count for each."""
    if isinstance(keep, numbers.Integral):
        raise TypeError(f"keep must be a float ratio or a sequence with one entry a layer, got the int {keep!r}")
    entries = [keep] * len(layers) if isinstance(keep, numbers.Real) else keep
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"keep must be a float or a sequence of floats and ints, got {keep!r}")
    if len(entries) != len(layers):
        raise ValueError(f"keep has {len(entries)} entries for the {len(layers)} layers {list(layers)}")
    counts = {}
    entering = num_patches
    for layer, entry in zip(layers, entries, strict=True):
        if isinstance(entry, numbers.Integral) and not isinstance(entry, bool):
            count = int(entry)
        elif isinstance(entry, numbers.Real) and not isinstance(entry, bool):
            count = method.keep_count(_check_ratio("keep", entry), entering)
            if count < 1:
                raise ValueError(f"keep={entry} leaves none of the {entering} patch tokens that enter layer {layer}")
        else:
            raise TypeError(f"keep must hold floats (ratios) and ints (token counts), got {entry!r}")
        counts[layer] = entering = count
    return counts


def counts_from_macs(
    macs: float | None, layers: tuple[int, ...], model: nn.Module, host: Host, method: Method
) -> dict[int, int]:
    """Bisect for the costliest of the method's plans within the target."""
    target = _check_ratio("macs", macs)
    share = MacsShare(model)

    def at(strength: float) -> dict[int, int]:
        return method.plan(strength, layers, host.num_patches)

    if share(at(0.0), method) > target:
        raise ValueError(
            f"macs={target} is out of reach: {method.name} at layers {list(layers)} cannot go below "
            f"{share(at(0.0), method):.3f} of the dense model"
        )
    return at(largest(lambda strength: share(at(strength), method) <= target))


def largest(holds: Callable[[float], bool]) -> float:
    """The largest ratio in [0, 1] for which a monotone condition holds that holds at 0."""
    if holds(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):  # below the spacing of floats
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check_ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float in (0, 1], got {value!r}")
    ratio = float(value)
    if not 0 < ratio <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return ratio


def check_integral(name: str, value: Any, low: int) -> None:
    """``value`` is an integer from ``low`` on; NumPy's integers are fine, as the caller converts them."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if int(value) < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
