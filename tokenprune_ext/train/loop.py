"""The training loop: one process or several, resumed where it was, with the method as an `Objective`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune_ext import checkpoint
from tokenprune_ext.distributed import Processes
from tokenprune_ext.environment import environment

from . import state
from .data import TrainingData, batches
from .log import Log, tensorboard_writer
from .objective import Objective
from .options import Options
from .run import Run
from .state import RunError


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        model: what the objective finished, in eval mode.
        steps: steps of the run.
        resumed_at: those that were there already.
        top1: accuracy on the held-out images after the last epoch; None without any.
    """

    model: nn.Module
    steps: int
    resumed_at: int
    top1: float | None


def train(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    options: Options,
    output: Path,
    *,
    processes: Processes | None = None,
    settings: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    console: Any = None,
) -> Trained:
    """Train a model, or go on with a run that was interrupted, and write the result to `output`.

    On a CPU, a run that was killed at any moment and is started again the same way ends with the same bits.

    Args:
        model: float32 weights to start from, on the device of `processes`; it is trained in place.
        objective: the method.
        data: images and their preprocessing.
        options: how.
        output: folder of this run alone: run.json, metrics.csv, checkpoint.pt and, at the end, model.safetensors.
        processes: who takes part; every one calls this with the same arguments. By default this one, on the CPU.
        settings: further plain values the weights depend on, such as the method's and the names of model and data; a
            run is only resumed with the same.
        tensorboard: write event files too.
        console: a rich console for progress.

    Raises:
        RunError: the folder is another run's or something else's, or the data or weights cannot be used.
        Diverged: a loss or gradient is not finite.
        DataError: an image cannot be read.
    """
    group = processes or Processes(0, 1, torch.device("cpu"))
    chosen = state.plain(options.settings() | _facts(model, data, group) | dict(settings or {}))

    def check() -> dict[str, Any] | None:
        _check(model, data, options)
        if tensorboard:
            tensorboard_writer()
        return state.resumable(output, chosen)

    with ExitStack() as stack:
        stored = group.together(check)
        run = group.together(lambda: Run(model, objective, data, options, output, group, chosen, stored))
        lock = group.together(lambda: state.claim(output, chosen, environment(group.device)) if group.leads else None)
        run.start()
        log = None
        if lock is not None:
            stack.enter_context(lock)
            log = stack.enter_context(Log(output, run.step, run.plan.steps, tensorboard=tensorboard, console=console))
            if stored is not None and console is not None:
                console.print(f"resumed at step {run.step} of {run.plan.steps}")
        resumed_at = run.step
        for images, labels in batches(data, run.plan):
            run.advance(images, labels, log)
            run.after_step(log)
        finished = objective.finish(run.model).eval()
        if group.leads:
            checkpoint.save(finished, output / state.MODEL)
        return Trained(finished, run.plan.steps, resumed_at, run.top1)


def _facts(model: nn.Module, data: TrainingData, group: Processes) -> dict[str, Any]:
    return {
        "initial weights": state.digest(model),
        "images": len(data.images),
        "held-out images": 0 if data.held_out is None else len(data.held_out[0]),
        "processes": group.count,
        "device": group.device.type,
    }


def _check(model: nn.Module, data: TrainingData, options: Options) -> None:
    for name, value in model.named_parameters():
        if value.dtype not in (torch.float32, torch.float64):
            raise RunError(f"{name} is {value.dtype}: weights are trained in float32, and computed with in options.amp")
    for source in (data.images, *(data.held_out or ())[:1]):
        labels = getattr(source, "labels", ())  # of image files; generated ones are all labelled
        if labels is None:
            raise RunError("the images have no labels to train on")
        if labels and not 0 <= min(labels) <= max(labels) < data.classes:
            raise RunError(f"labels from {min(labels)} to {max(labels)} do not fit the model's {data.classes} classes")
    if data.classes < 2 or not len(data.images):
        raise RunError(f"{len(data.images)} images of {data.classes} classes are nothing to train on")
