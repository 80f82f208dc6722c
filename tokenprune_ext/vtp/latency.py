"""Remove channels until a model is as fast as wanted."""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenprune_ext.channels import PLACES, Widths
from tokenprune_ext.latency import Clock, time_in_turns

from .gates import remove_gates
from .prune import ranking_of, removed
from .ranking import Ranking
from .width_table import WidthTable, measure_widths

_CANDIDATES = 512  # positions of a ranking that are tried
_ROUNDS = 6  # of pruning, measuring and correcting the estimate
_SLACK = 0.02  # a share that is missed by less is met


@dataclass(frozen=True)
class AsFast:
    """A smaller model and its time.

    Attributes:
        model: without gates, in eval mode where the gated one was.
        measured: its latency over the dense model's, median of the rounds of one interleaved run.
        estimated: the same by the table of widths.
    """

    model: nn.Module
    measured: float
    estimated: float


def prune_to_latency(
    model: nn.Module,
    share: float,
    images: Tensor,
    *,
    align: int | str | Path = 1,
    table: WidthTable | None = None,
    budget_s: float = 10.0,
    clock: Clock | None = None,
) -> AsFast:
    """A smaller copy of a model with gates that takes ``share`` of the dense model's time, measured.

    Channels go in the order of :func:`~tokenprune_ext.vtp.prune`. A table of widths says how many have to; the model
    that comes out is timed beside the dense one, and the table's answer corrected by what was found, until the model
    takes ``share`` of the time or up to 0.02 less.

    Args:
        model: a model with gates, on its device; it is not changed.
        share: wanted latency over the dense model's, in (0, 1].
        images: a batch ``[B, 3, H, W]`` of the size that counts.
        align: see :func:`~tokenprune_ext.vtp.prune`.
        table: from :func:`measure_widths`; measured here by default, for twice the budget.
        budget_s: seconds for each of up to six comparisons with the dense model.
        clock: see ``latency.time_in_turns``.

    Returns:
        Of the models that were tried and took no more than ``share``, the one with the most channels.

    Raises:
        ValueError: no gates, a share outside (0, 1], or one that no model that was tried keeps to.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    ranking = ranking_of(model, align)
    if table is None:
        table = measure_widths(model, images, align=ranking.align, budget_s=2 * budget_s, clock=clock)
    if share == 1:
        return AsFast(removed(model, ranking, len(ranking.totals) - 1), 1.0, 1.0)
    dense = remove_gates(copy.deepcopy(model)).eval()
    whole = table.estimate(_widths(ranking, len(ranking.totals) - 1))
    wanted, tried = share, dict[int, AsFast]()
    while len(tried) < _ROUNDS:
        try:
            position = fastest_enough(ranking, table, wanted)
        except ValueError:
            if tried:
                break
            raise
        if position in tried:
            break
        smaller = removed(model, ranking, position)
        measured = _share_of_time(smaller, dense, images, budget_s, clock)
        tried[position] = AsFast(smaller, measured, table.estimate(_widths(ranking, position)) / whole)
        if share - _SLACK <= measured <= share:
            break
        wanted = min(1.0, wanted * (share - _SLACK / 2) / measured)
    fast = [position for position, found in tried.items() if found.measured <= share]
    if not fast:
        closest = min(found.measured for found in tried.values())
        raise ValueError(
            f"share {share} is not reached: {len(tried)} models were tried, and the fastest takes {closest:.3f} of "
            "the dense one's time"
        )
    return tried[max(fast)]


def _share_of_time(smaller: nn.Module, dense: nn.Module, images: Tensor, budget_s: float, clock: Clock | None) -> float:
    mode = smaller.training
    calls = {"dense": partial(dense, images), "smaller": partial(smaller.eval(), images)}
    with torch.inference_mode(), torch.cuda.device(images.device) if images.is_cuda else nullcontext():
        times = time_in_turns(calls, cuda=images.is_cuda, budget_s=budget_s, clock=clock)
    smaller.train(mode)
    return statistics.median(one / other for one, other in zip(times["smaller"], times["dense"], strict=True))


def fastest_enough(ranking: Ranking, table: WidthTable, share: float) -> int:
    """The position in the ranking's totals with the most channels whose estimate is within ``share`` of the dense one.

    Raises:
        ValueError: there is none.
    """
    last = len(ranking.totals) - 1
    dense = table.estimate(_widths(ranking, last))
    positions = sorted({round(last * step / _CANDIDATES) for step in range(_CANDIDATES + 1)}, reverse=True)
    for position in positions:
        if table.estimate(_widths(ranking, position)) <= share * dense:
            return position
    least = table.estimate(_widths(ranking, 0)) / dense
    raise ValueError(f"share {share} is out of reach: the narrowest model takes {least:.3f} of the dense one's time")


def _widths(ranking: Ranking, position: int) -> list[Widths]:
    flat = iter(ranking.widths(position).values())
    return list(zip(*[flat] * len(PLACES), strict=True))
