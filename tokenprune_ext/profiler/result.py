"""What a profile holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenprune_ext.schedule import Schedule

from .blocks import BlockTable
from .series import Series
from .settings import Settings
from .steps import Step
from .utility import Choice

_NOISY = 0.02  # relative standard error from which a choice among neighbours is luck


@dataclass(frozen=True)
class BatchProfile:
    """What was found for one batch size.

    Attributes:
        series: latency of the model by patch tokens kept.
        workload: batch size times tokens times channels, at each count of the series.
        steps: steps beyond the noise, and ``verdict`` says the same in words.
        skipped: counts of the grid that were not measured.
        blocks: latencies of single blocks; None when they were not measured.
        margin: share of the dense latency by which a count had to be faster to be chosen.
        choice: the count of the highest utility; None without images.
        sweep: the same for alpha = 0, 0.1, ..., 1; empty without images.
        schedule: what reproduces the choice.
    """

    batch_size: int
    series: Series
    workload: tuple[int, ...]
    steps: tuple[Step, ...]
    verdict: str
    skipped: tuple[int, ...]
    blocks: BlockTable | None
    margin: float
    choice: Choice | None
    sweep: tuple[Choice, ...]
    schedule: Schedule | None


@dataclass(frozen=True)
class Profile:
    """Everything that was measured and chosen.

    Attributes:
        accuracy: measure, value and standard error by patch tokens kept; empty without images.
        clocks: state of the device's clocks before and after.
        notes: what a reader has to know.
    """

    settings: Settings
    environment: dict[str, Any]
    clocks: dict[str, dict[str, str]]
    accuracy: dict[int, dict[str, Any]]
    batches: tuple[BatchProfile, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    def accuracy_at(self, counts: Iterable[int]) -> dict[int, float]:
        """Accuracy at token counts; on a line between two that were evaluated."""
        known = sorted(self.accuracy)
        values = [self.accuracy[tokens]["value"] for tokens in known]
        return {tokens: float(np.interp(tokens, known, values)) for tokens in counts}


def notes_on(one: BatchProfile) -> list[str]:
    """What a reader has to know of one batch size."""
    name = f"batch {one.batch_size}"
    notes = [f"{name}: {one.verdict}"]
    if one.series.noise > _NOISY:
        notes.append(
            f"{name}: latencies closer than {200 * one.series.noise:.1f} % cannot be told apart, nor can counts be "
            "chosen among them: repeat on a quiet machine, or with more rounds"
        )
    if one.skipped:
        notes.append(f"{name}: {len(one.skipped)} token counts were not measured: {ranges(one.skipped)}")
    if one.choice is not None and one.choice.removed == 0:
        notes.append(f"{name}: nothing beats dense at alpha = {one.choice.alpha:g}, so R = 0")
    return notes


def ranges(values: Sequence[int]) -> str:
    """Whole numbers, ascending, with runs as first-last."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
