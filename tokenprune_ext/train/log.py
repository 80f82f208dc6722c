"""What a training run says: a progress bar, metrics.csv and TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tokenprune_ext.files import replacing

from .state import RunError

METRICS = "metrics.csv"
_LEADING, _TRAILING = ("step", "epoch", "lr", "loss"), ("grad_norm", "images_per_s", "top1")


def tensorboard_writer() -> Any:
    """torch's SummaryWriter.

    Raises:
        RunError: the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("TensorBoard is not installed: pip install 'tokenprune[train]'") from error
    return SummaryWriter


class Log:
    """Rows of a run, each the mean over the steps since the row before; only the leading process has one.

    Args:
        folder: of the run.
        step: steps done; later rows of an interrupted run are dropped, because they are done again.
        steps: steps of the whole run.
        tensorboard: write event files too, into the folder `tensorboard`.
        console: where progress is shown, None for nowhere.
    """

    def __init__(self, folder: Path, step: int, steps: int, *, tensorboard: bool = False, console: Any = None) -> None:
        self.path, self.console, self.step = folder / METRICS, console, step
        self._sums: dict[str, float] = {}
        self._steps = self._images = 0
        self._since = self._until = time.perf_counter()
        self._columns = _keep_rows(self.path, step)
        self._file: TextIO = self.path.open("a", newline="", encoding="utf-8")
        self._events = tensorboard_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None
        self._progress: Any = None
        if console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            shown = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
            self._progress = Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
            self._task = self._progress.add_task("steps", total=steps, completed=step, state="")
            self._progress.start()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._progress is not None:
            self._progress.stop()

    def add(self, values: Mapping[str, float], images: int) -> None:
        """A step is done."""
        self.step += 1
        self._until = time.perf_counter()
        self._steps += 1
        self._images += images
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if self._progress is not None:
            self._progress.update(self._task, completed=self.step, state=f"loss {values['loss']:.4g}")

    def write(self, epoch: int, lr: float, top1: float | None, *, epoch_ends: bool) -> None:
        """A row of the steps since the last one, with the accuracy on the held-out images where it was measured."""
        if not self._steps:
            return
        row: dict[str, Any] = {"step": self.step, "epoch": epoch, "lr": lr}
        row |= {name: total / self._steps for name, total in self._sums.items()}
        row |= {"images_per_s": round(self._images / (self._until - self._since), 2), "top1": top1}
        if not self._columns:
            parts = [name for name in self._sums if name not in (*_LEADING, *_TRAILING)]
            self._columns = [*_LEADING, *parts, *_TRAILING]
            csv.writer(self._file).writerow(self._columns)
        csv.DictWriter(self._file, self._columns).writerow(row)
        self._file.flush()
        if self._events is not None:
            for name in self._columns[2:]:
                if row[name] is not None:
                    self._events.add_scalar(name, row[name], self.step)
            self._events.flush()
        if epoch_ends and self.console is not None:
            accuracy = "" if top1 is None else f", top-1 {top1:.2%}"
            speed = f"{row['images_per_s']:g} images/s"
            self.console.print(f"epoch {epoch}, step {self.step}: loss {row['loss']:.4f}{accuracy}, {speed}")
        self._sums.clear()
        self._steps = self._images = 0
        self._since = time.perf_counter()


def _keep_rows(path: Path, step: int) -> list[str]:
    """Drop the rows after a step, and one that was half written; returns the columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if len(row) == len(columns) and int(row[0]) <= step]
    with replacing(path) as target, target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *kept] if kept else [])
    return columns if kept else []
