"""From a model with trained gates to a smaller one, at a wanted rate."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from tokenprune_ext.channels import narrow

from .gates import gates_of, remove_gates
from .ranking import Ranking, tile_of


def prune(model: nn.Module, rate: float, align: int | str | Path = 1) -> nn.Module:
    """A smaller copy of a model with gates: the share ``rate`` of all its channels is removed.

    One threshold on |gate| holds for the whole network; at least one channel stays at each place, and of equal gates
    those of earlier places and lower indices stay. The copy has no gates, they are multiplied into its weights.

    Args:
        model: a model with gates; it is not changed.
        rate: in [0, 1).
        align: kept widths are multiples of it (a place that loses nothing keeps its width). The channels of a place
            then stay or go in groups, and the rate is met to within half a group. The name of a described device, or a
            file that describes one, stands for its narrowest tile.

    Raises:
        ValueError: no gates, a rate outside [0, 1), or one that leaves a place without a channel.
        DeviceError: the device is unknown, or its description has no sizes of tiles.
    """
    ranking = ranking_of(model, align)
    return removed(model, ranking, ranking.at_rate(rate))


def ranking_of(model: nn.Module, align: int | str | Path = 1) -> Ranking:
    """The channels of a model with gates in the order in which they stay; for ``align`` see :func:`prune`.

    Raises:
        ValueError: the model has no gates.
    """
    gates = gates_of(model)
    if not gates:
        raise ValueError("the model has no gates: call add_gates first")
    return Ranking(gates, tile_of(align) if isinstance(align, str | Path) else align)


def removed(model: nn.Module, ranking: Ranking, position: int) -> nn.Module:
    """A smaller copy of a model with gates, with the channels at a position of the ranking's totals."""
    gates = {name: gate.detach().clone() for name, gate in gates_of(model).items()}
    return narrow(remove_gates(copy.deepcopy(model)), ranking.kept(position), gates)
