"""A table of block latencies, from which the latency of any schedule is estimated without running it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tokenprune_ext.environment import device_name
from tokenprune_ext.methods import Dense

from .journal import ProfileError, Records
from .models import ModelTarget, block_kinds
from .points import points_of, stride_grid
from .series import Visits, build_series
from .sweep import OnVisit, Plan, Target, sweep


@dataclass(frozen=True)
class BlockTable:
    """Seconds of one block of the dense model, at token counts.

    Attributes:
        batch_size: images of a call.
        num_patches: patch tokens of the dense model.
        tokens: patch tokens that enter, ascending.
        kinds: for every block, the entry of ``seconds`` that holds for it; blocks of equal shapes share one.
        seconds: latency at each of ``tokens``, by kind.
        device, dtype: where and in what it was measured.
    """

    batch_size: int
    num_patches: int
    tokens: tuple[int, ...]
    kinds: tuple[str, ...]
    seconds: dict[str, tuple[float, ...]]
    device: str
    dtype: str

    def latency(self, block: int, tokens: int) -> float:
        """Seconds of a block that so many patch tokens enter; on a line between two counts that were measured.

        Raises:
            ValueError: there is no such block, or the count is outside the table.
        """
        if not 0 <= block < len(self.kinds):
            raise ValueError(f"block must be in 0..{len(self.kinds) - 1}, got {block}")
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            raise ValueError(f"tokens must be in {self.tokens[0]}..{self.tokens[-1]}, got {tokens}")
        return float(np.interp(tokens, self.tokens, self.seconds[self.kinds[block]]))

    def estimate(self, keep: Mapping[int, int]) -> list[float]:
        """Seconds of every block under the keep counts of a schedule, choosing tokens left out.

        A pruning block counts with the tokens that enter it.

        Raises:
            ValueError: as :meth:`latency`.
        """
        tokens, result = self.num_patches, []
        for block in range(len(self.kinds)):
            result.append(self.latency(block, tokens))
            tokens = keep.get(block, tokens)
        return result

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockTable:
        """Undo :meth:`to_dict`, also after JSON."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**{**plain, "seconds": {kind: tuple(row) for kind, row in values["seconds"].items()}})

    @classmethod
    def load(cls, path: str | Path, batch_size: int) -> BlockTable:
        """The table of a batch size from a ``profile.json``.

        Raises:
            ProfileError: it is no profile, or has no such table; the message names the file.
            FileNotFoundError: there is no such file.
        """
        try:
            tables = [
                cls.from_dict(one["blocks"])
                for one in json.loads(Path(path).read_text("utf-8"))["batches"]
                if one["blocks"] is not None
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ProfileError(f"{path} is no profile: {error!r}") from error
        found = {table.batch_size: table for table in tables}
        if batch_size not in found:
            raise ProfileError(f"{path} has block latencies for the batch sizes {sorted(found)}, not {batch_size}")
        return found[batch_size]


def block_table(visits: Visits, kinds: tuple[str, ...], batch_size: int, model: nn.Module, patches: int) -> BlockTable:
    """The table of a batch size from visits of :func:`block_kinds`."""
    parameter = next(model.parameters())
    found = build_series({key: times for key, times in visits.items() if key[0].kind in kinds})
    series = {kind: found[kind, batch_size] for kind in dict.fromkeys(kinds)}
    return BlockTable(
        batch_size=batch_size,
        num_patches=patches,
        tokens=next(iter(series.values())).tokens,
        kinds=kinds,
        seconds={kind: own.median_s for kind, own in series.items()},
        device=device_name(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
    )


def block_latency(
    model: nn.Module,
    counts: Iterable[int] | None = None,
    *,
    batch_size: int = 1,
    rounds: int = 5,
    visit_s: float = 0.05,
    cuda_graph: bool = False,
    seed: int = 0,
    target: Target | None = None,
    on_visit: OnVisit = lambda done, needed: None,
) -> BlockTable:
    """Measure the latency of the blocks of a dense model at token counts, in random order over several rounds.

    Args:
        model: a supported model on its device, in its dtype; it is not changed.
        counts: patch tokens that enter a block; by default every eighth, and 1.
        batch_size: images.
        rounds, visit_s, cuda_graph, seed: see ``Settings``.
        target: what runs and times the calls; by default the model on its device.
        on_visit: called with the visits done and those known to be needed.

    Raises:
        UnsupportedModelError: the model is not understood.
        ValueError: a count that the model does not have, or CUDA graphs on another device.
    """
    own = ModelTarget(model, Dense(), 0, graph=cuda_graph, seed=seed)
    patches = own.host.num_patches
    tokens = stride_grid(1, patches, 8) if counts is None else tuple(sorted({*counts}))
    if not tokens or not 1 <= tokens[0] <= tokens[-1] <= patches:
        raise ValueError(f"counts must be patch tokens in 1..{patches}, got {tokens}")
    kinds, records = block_kinds(model), Records()
    points = points_of(dict.fromkeys(kinds), (batch_size,), tokens)
    with own.on_device():
        sweep(target or own, records, points, Plan(rounds, visit_s, float("inf"), seed), on_visit=on_visit)
    return block_table(records.visits, kinds, batch_size, model, patches)
