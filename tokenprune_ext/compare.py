"""Compare pruned variants of one model with the dense model: MACs, accuracy, latency and memory in one run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tokenprune_ext.data import ImageSource, batches
from tokenprune_ext.environment import environment
from tokenprune_ext.evaluate import Accuracy, evaluate
from tokenprune_ext.latency import Latency, measure_latency, peak_memory
from tokenprune_ext.methods import Dense, Method
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.prune import apply, describe, schedule_of
from tokenprune_ext.report.pictures import Picture, take_pictures
from tokenprune_ext.schedule import Schedule, default_layers

DENSE = "dense"
_NOISY_SPREAD = 1.25  # on a quiet machine the middle three fifths of the rounds lie within a few per cent


class CompareError(ValueError):
    """A comparison in which nothing can be compared; the message says why."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image; fractions are of the dense model's.

    Attributes:
        blocks: of the blocks, scoring left out, as in the papers' tables.
        scoring: of choosing and merging tokens.
        charged_fraction: blocks and scoring together, over the dense blocks; what a budget limits.
        model: of the whole model, scoring left out.
    """

    blocks: int
    blocks_fraction: float
    scoring: int
    charged_fraction: float
    model: int
    model_fraction: float


@dataclass(frozen=True)
class Row:
    """One variant of the model and what was measured; None where it was not.

    Attributes:
        name: unique name of the row.
        method: label of the pruning method or schedule; None for the dense model.
        budget: wanted fraction of the dense blocks' MACs, scoring charged; None for the dense model, for schedules and
            for methods that prune nothing.
        schedule: keep counts and options that reproduce the row (`Schedule` as a dictionary).
        peak_memory: bytes one forward holds beyond weights and input.
    """

    name: str
    method: str | None
    budget: float | None
    schedule: dict[str, Any] | None
    macs: Macs
    accuracy: Accuracy
    latency: Latency | None
    peak_memory: int


@dataclass(frozen=True)
class Comparison:
    """All rows, dense first, with what is needed to read and to repeat them."""

    model: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values for JSON."""
        return {
            "model": self.model,
            "settings": self.settings,
            "environment": self.environment,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class _Variant:
    method: str | None
    budget: float | None
    model: nn.Module


def compare(
    model: nn.Module,
    images: ImageSource,
    transform: Callable[[Any], Any],
    *,
    data_config: Mapping[str, Any],
    methods: Mapping[str, Method],
    budgets: Sequence[float] = (0.8, 0.64, 0.54),
    schedules: Mapping[str, Schedule] | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    latency_budget_s: float | None = 60.0,
    class_names: Sequence[str] | None = None,
    picture_count: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Compare `model` with itself pruned by every method at every budget, and by every schedule.

    A method that prunes nothing, like `dense` with `class_token_only`, gets one row without a budget.

    Args:
        model: a dense timm vision transformer; moved to `device` and cast to `dtype` (weights and inputs; no
            autocast). It is not patched: variants are copies that share its weights.
        images: what to evaluate on; labels below 0 mean unlabelled.
        transform, data_config: preprocessing of one PIL image, and its configuration (see `data.preprocessing`).
        methods: methods by the label of their rows.
        budgets: fractions of the dense blocks' MACs to keep, scoring charged, each in (0, 1].
        schedules: schedules by label, one further row each.
        latency_budget_s: seconds for the interleaved latency rounds; None leaves latency out. On a CPU
            `latency.keep_freed_memory` should be called first, as the command line does.
        class_names: names for the captions of the pictures, in the order of the classes.
        picture_count: images to draw the kept patches on.
        progress: where to show progress bars.

    Raises:
        CompareError: the model is not supported, no method reaches any budget, or a schedule does not fit the model.
        DataError, EvaluationError: see `data.batches` and `evaluate.evaluate`.
    """
    progress = progress or Progress(disable=True)
    device = torch.device(device)
    model = model.eval().to(device, dtype)
    variants, notes = _variants(model, methods, budgets, schedules or {})
    models = {name: variant.model for name, variant in variants.items()}
    loader = partial(batches, transform=transform)

    task = progress.add_task(f"accuracy of {len(models)} variants", total=len(images))
    accuracy = evaluate(
        models,
        loader(images, batch_size=batch_size, workers=workers),
        device=device,
        dtype=dtype,
        on_batch=lambda done: progress.advance(task, done),
    )
    sample = _full_batch(images, loader, batch_size).to(device, dtype)
    latency: dict[str, Latency] = {}
    if latency_budget_s is not None:
        timing = progress.add_task("latency, interleaved rounds", total=latency_budget_s)
        latency = measure_latency(
            models,
            sample,
            budget_s=latency_budget_s,
            on_time=lambda spent: progress.update(timing, completed=min(spent, latency_budget_s)),
        )
        notes += _noise_note(latency[DENSE])
    memory = {name: peak_memory(net, sample) for name, net in progress.track(models.items(), description="peak memory")}
    rows = tuple(
        Row(
            name=name,
            method=variant.method,
            budget=variant.budget,
            schedule=None if name == DENSE else asdict(schedule_of(variant.model)),
            macs=macs_of(variant.model),
            accuracy=accuracy[name],
            latency=latency.get(name),
            peak_memory=memory[name],
        )
        for name, variant in variants.items()
    )
    return Comparison(
        model=describe(model).model,
        settings={
            "images": len(images),
            "batch_size": batch_size,
            "dtype": _dtype_text(dtype),
            "latency_budget_s": latency_budget_s,
            "methods": list(methods),
            "budgets": list(budgets),
            "schedules": list(schedules or {}),
            "preprocessing": dict(data_config),
        },
        environment=environment(device),
        rows=rows,
        notes=tuple(notes),
        pictures=_pictures(variants, images, loader, data_config, class_names, picture_count, device, dtype),
    )


def share(model: nn.Module) -> nn.Module:
    """A deep copy of the modules around the very same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _variants(
    model: nn.Module, methods: Mapping[str, Method], budgets: Sequence[float], schedules: Mapping[str, Schedule]
) -> tuple[dict[str, _Variant], list[str]]:
    try:
        host = inspect_host(model)
    except (TypeError, ValueError) as error:
        raise CompareError(str(error)) from error
    variants = {DENSE: _Variant(None, None, model)}
    notes: list[str] = []
    for label, method in methods.items():
        if method == Dense():  # the first row
            continue
        targets = sorted(set(budgets), reverse=True) if default_layers(method.for_host(host), host) else [None]
        for budget in targets:
            name = label if budget is None else f"{label} {_percent(budget)}"
            if name in variants:
                raise CompareError(f"method {label}: another row has this name")
            try:
                changed = apply(share(model), method, macs=budget)
            except (TypeError, ValueError) as error:  # this method cannot do this model or this budget; others may
                notes.append(f"{name} left out: {error}")
                continue
            variants[name] = _Variant(label, budget, changed)
    for label, schedule in schedules.items():
        if label in variants:
            raise CompareError(f"schedule {label}: another row has this name")
        try:
            variants[label] = _Variant(label, None, apply(share(model), schedule))
        except (TypeError, ValueError) as error:
            raise CompareError(f"schedule {label}: {error}") from error
    if len(variants) == 1:
        raise CompareError(
            "nothing to compare: " + ("; ".join(notes) or "no schedule and no method that changes the model given")
        )
    return variants, notes


def _dtype_text(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"{name} (weights and inputs cast, no autocast)"


def _noise_note(dense: Latency) -> list[str]:
    spread = dense.q80_s / dense.q20_s
    if spread < _NOISY_SPREAD:
        return []
    return [
        f"latency is unreliable: the 80 % quantile of dense is {spread:.2f} times its 20 % quantile, so something else "
        "was running; repeat on a quiet machine or with a larger time budget"
    ]


def _full_batch(images: ImageSource, loader: Callable[..., Any], batch_size: int) -> Tensor:
    """A batch of the first images, repeated when there are fewer than `batch_size`."""
    first, _ = next(iter(loader(images, batch_size=min(batch_size, len(images)))))
    return first.repeat(-(-batch_size // len(first)), 1, 1, 1)[:batch_size]


def macs_of(model: nn.Module) -> Macs:
    """What `prune.describe` says of the model's cost."""
    report = describe(model)
    return Macs(
        blocks=report.blocks_macs,
        blocks_fraction=report.blocks_macs / report.dense_blocks_macs,
        scoring=report.scoring_macs,
        charged_fraction=(report.blocks_macs + report.scoring_macs) / report.dense_blocks_macs,
        model=report.model_macs,
        model_fraction=report.model_macs / report.dense_model_macs,
    )


def _pictures(
    variants: Mapping[str, _Variant],
    images: ImageSource,
    loader: Callable[..., Any],
    data_config: Mapping[str, Any],
    class_names: Sequence[str] | None,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Picture, ...]:
    """Pictures of what prunes: methods at the middle budget, and schedules; on images spread over the set."""
    done = sorted({v.budget for v in variants.values() if v.budget is not None})
    shown = {
        name: variant.model
        for name, variant in variants.items()
        if name != DENSE
        and schedule_of(variant.model).keep
        and (variant.budget is None or variant.budget == done[len(done) // 2])
    }
    count = min(count, len(images))
    if not count:
        return ()
    indices = [i * len(images) // count for i in range(count)]
    pixels, labels = next(iter(loader([images[i] for i in indices], batch_size=count)))
    names = [_image_name(images, i) for i in indices]
    return take_pictures(
        variants[DENSE].model,
        shown,
        pixels.to(device, dtype),
        labels=[int(label) for label in labels],
        names=names,
        class_names=class_names,
        mean=data_config["mean"],
        std=data_config["std"],
    )


def _image_name(images: ImageSource, index: int) -> str:
    files: Sequence[Path] | None = getattr(images, "files", None)
    return files[index].name if files else f"image {index}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"
