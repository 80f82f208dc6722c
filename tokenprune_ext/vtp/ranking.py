"""Which channels stay: one threshold over the whole network, in groups as wide as the device likes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int
from tokenprune_ext.profiler.device import load_device


class Ranking:
    """All channels at all places, from the first that stays to the last.

    The channels of a place are sorted by |gate|, the lower index first among equals, and cut into groups of ``align``;
    the last one has what is left over. A group counts with its mean. The first group of every place comes before all
    others, then the larger mean, among equals the earlier place. With ``align=1`` that is a threshold on |gate|.

    Args:
        gates: their values, ``[channels]`` each, by place.
        align: kept widths are multiples of it, or all of a place's channels.

    Raises:
        TypeError, ValueError: ``align`` is no whole number from 1 on, or a gate is not finite.
    """

    def __init__(self, gates: Mapping[str, Tensor], align: int = 1) -> None:
        check_int("align", align, 1)
        self.align = align
        self._orders: dict[str, Tensor] = {}
        values, sizes, places = [], [], []
        for index, (place, gate) in enumerate(gates.items()):
            importance, order = gate.detach().double().abs().cpu().sort(descending=True, stable=True)
            if not importance.isfinite().all():
                raise ValueError(f"the gates of {place} are not finite: the training diverged")
            self._orders[place] = order
            groups = importance.split(align)
            values.append(torch.stack([group.mean() for group in groups]) if align > 1 else importance.clone())
            values[-1][0] = torch.inf
            sizes.append(torch.tensor([len(group) for group in groups]))
            places.append(torch.full((len(groups),), index))
        ranked = torch.cat(values).argsort(descending=True, stable=True)
        self._places = torch.cat(places)[ranked]
        self._sizes = torch.cat(sizes)[ranked]

    @cached_property
    def totals(self) -> Tensor:
        """int64: how many channels stay with the first group of every place, with one more group, ..., with all."""
        return self._sizes.cumsum(0)[len(self._orders) - 1 :]

    def at_rate(self, rate: float) -> int:
        """The position in ``totals`` whose share of removed channels is nearest to ``rate``; of two, that with more.

        Raises:
            ValueError: a rate outside [0, 1), or one that leaves some place without a channel.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        total = int(self.totals[-1])
        wanted, least = total - round(rate * total), int(self.totals[0])
        if wanted < least:
            raise ValueError(
                f"a rate of {rate} leaves {wanted} of {total} channels, and {least} have to stay: {self.align} at each "
                f"of {len(self._orders)} places; the largest rate is {1 - least / total:.4f}"
            )
        off = (self.totals - wanted).abs()
        return int((off == off.min()).nonzero()[-1])

    def widths(self, position: int) -> dict[str, int]:
        """How many channels of every place stay at a position of ``totals``."""
        count = position + len(self._orders)
        widths = torch.zeros(len(self._orders), dtype=torch.int64)
        widths.index_add_(0, self._places[:count], self._sizes[:count])
        return dict(zip(self._orders, widths.tolist(), strict=True))

    def kept(self, position: int) -> dict[str, Tensor]:
        """Which channels of every place stay at a position of ``totals``: int64, ascending."""
        return {place: self._orders[place][:width].sort().values for place, width in self.widths(position).items()}


def tile_of(device: str | Path) -> int:
    """The multiple of channels in which products of matrices get faster on a described device.

    That is the number of output channels of its narrowest tile: a product is cut into tiles, and one that is not full
    takes as long as a full one.

    Raises:
        DeviceError: no such device or file, or one without sizes of tiles.
    """
    return min(tile.columns for tile in load_device(device).gemm_tiles)
