"""What a schedule costs in time, estimated from a table of block latencies and a few whole models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tokenprune_ext.compare import share
from tokenprune_ext.latency import measure_latency
from tokenprune_ext.macs import MacsShare, block_costs, blocks_macs
from tokenprune_ext.methods import Method
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.profiler import BlockTable, block_latency
from tokenprune_ext.prune import apply
from tokenprune_ext.schedule import Schedule

from .space import Space

Array = np.ndarray[Any, np.dtype[np.float64]]

_CALIBRATED_AT = 0.7  # share of the MACs of the schedules that are measured


@dataclass(frozen=True)
class Overhead:
    """Seconds that the table of the blocks does not hold.

    Attributes:
        outside_s: of the model outside its blocks.
        layer_s: of every pruning layer.
        token_s: of every patch token that enters a pruning layer.
    """

    outside_s: float
    layer_s: float
    token_s: float


class LatencyShare:
    """Estimated latency of a model under a schedule, over the dense model's.

    Every block counts with its latency at the tokens that enter it; one that does less than a dense block (tokens leave
    before its MLP, or only the class token is computed) in proportion to its MACs. What pruning itself takes is fitted
    to whole pruned models, see :meth:`measure`.

    Args:
        model: the model; its latency was measured.
        table: latency of its blocks.
        overhead: what comes on top.

    :meth:`check` says how far it is off.
    """

    def __init__(self, model: nn.Module, table: BlockTable, overhead: Overhead) -> None:
        self.table, self.overhead = table, overhead
        self._host, self._costs = inspect_host(model), block_costs(model)
        self._dense = overhead.outside_s + sum(table.estimate({}))

    def __call__(self, keep: Mapping[int, int], method: Method) -> float:
        """The share under these keep counts (block -> patch tokens that leave it)."""
        entering = _entering(keep, self._host.num_patches)
        own = self.overhead.outside_s
        own += self.overhead.layer_s * len(entering) + self.overhead.token_s * sum(entering)
        return (own + self._blocks_s(keep, method)) / self._dense

    def _blocks_s(self, keep: Mapping[int, int], method: Method) -> float:
        seconds, patches = 0.0, self._host.num_patches
        for block, (macs, _) in enumerate(blocks_macs(self._costs, self._host, keep, method)):
            tokens = self._host.num_prefix_tokens + patches
            whole = self._costs[block].macs(tokens, tokens)
            seconds += self.table.latency(block, patches) * macs / whole
            patches = keep.get(block, patches)
        return seconds

    @classmethod
    def measure(cls, model: nn.Module, space: Space, images: Tensor, budget_s: float) -> LatencyShare:
        """Measure the blocks, and what pruning takes beside them.

        The model is timed dense and under the uniform schedules of the space at 70 % of the MACs, interleaved; the
        three numbers of the overhead are their least squares, none of them below 0.

        Args:
            model: a dense model on its device.
            space: the method, and the schedules.
            images: the batch ``[B, 3, H, W]`` whose latency counts.
            budget_s: seconds for the whole models.
        """
        table = block_latency(model, batch_size=len(images))
        cost = MacsShare(model)
        plans = [space.schedule(way, space.method, _CALIBRATED_AT, cost) for way in space.uniform().values()]
        schedules = [plan for plan in plans if plan is not None]
        seconds = _latencies(model, schedules, images, budget_s)
        bare = cls(model, table, Overhead(0.0, 0.0, 0.0))
        rows, rest = [(1.0, 0.0, 0.0)], [seconds[0] - sum(table.estimate({}))]
        for schedule, measured in zip(schedules, seconds[1:], strict=True):
            entering = _entering(schedule.keep, schedule.num_patches)
            rows.append((1.0, float(len(entering)), float(sum(entering))))
            rest.append(measured - bare._blocks_s(schedule.keep, space.method))
        return cls(model, table, Overhead(*_least_squares(np.array(rows), np.array(rest))))

    def check(self, model: nn.Module, schedules: Sequence[Schedule], images: Tensor, budget_s: float) -> list[float]:
        """Measured latency of schedules over the dense model's, interleaved in one run."""
        dense, *pruned = _latencies(model, schedules, images, budget_s)
        return [seconds / dense for seconds in pruned]

    def save(self, path: Path) -> None:
        """Write what was measured as JSON."""
        content = {"table": self.table.to_dict(), "overhead": vars(self.overhead)}
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> LatencyShare:
        """Read what :meth:`save` wrote, for the same model."""
        content = json.loads(path.read_text("utf-8"))
        return cls(model, BlockTable.from_dict(content["table"]), Overhead(**content["overhead"]))


def _entering(keep: Mapping[int, int], patches: int) -> list[int]:
    """Patch tokens that enter each pruning layer."""
    return [patches, *keep.values()][: len(keep)]


def _latencies(model: nn.Module, schedules: Sequence[Schedule], images: Tensor, budget_s: float) -> list[float]:
    """Seconds of the dense model, and under every schedule."""
    models = {"dense": model}
    for number, schedule in enumerate(schedules):
        models[str(number)] = apply(share(model), schedule)
    return [latency.median_s for latency in measure_latency(models, images, budget_s=budget_s).values()]


def _least_squares(rows: Array, values: Array) -> list[float]:
    """Coefficients of the least squares, none below 0: those that would be are left out."""
    result = [0.0] * rows.shape[1]
    use = list(range(rows.shape[1]))
    while use:
        found = np.linalg.lstsq(rows[:, use], values, rcond=None)[0]
        if found.min() >= 0:
            for column, value in zip(use, found, strict=True):
                result[column] = float(value)
            break
        use.pop(int(found.argmin()))
    return result
