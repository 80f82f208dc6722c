"""A whole profile: measure, find steps, choose R, make schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from tokenprune_ext.environment import environment
from tokenprune_ext.schedule import Schedule

from .accuracy import data_facts, measure_accuracy
from .blocks import BlockTable, block_table
from .clocks import clock_state
from .journal import Journal
from .models import ModelTarget, block_kinds
from .points import MODEL, Point, points_of, stride_grid
from .result import BatchProfile, Profile, notes_on
from .series import Series, build_series
from .settings import Settings, device_facts
from .steps import find_steps, need_ruptures, verdict
from .sweep import Plan, Target, sweep, warm_up
from .utility import Choice, alpha_sweep, choose

_MARGIN = 3  # standard errors by which a choice must be faster than dense


def profile(
    model: nn.Module,
    settings: Settings,
    journal: str | Path,
    *,
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    accuracy_stride: int = 4,
    alpha: float = 0.5,
    origin: Mapping[str, Any] | None = None,
    target: Target | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure a model at every token count, find the steps of its latency, and choose how many tokens to remove.

    Everything measured is appended to ``journal`` at once; a run that was interrupted continues where it was.

    Args:
        model: the dense model that ``settings`` were built for, on its device, in its dtype; it is not changed.
        settings: what is measured.
        journal: JSON-lines file, made if needed.
        batches: preprocessed (images [B, 3, H, W], labels [B]) for the accuracy; without them nothing is chosen.
        accuracy_stride: distance of the token counts at which accuracy is measured; between them it is interpolated.
        alpha: weight of the latency in the utility, 0..1.
        origin: what the schedules' origin says besides, e.g. the command.
        target: what runs and times the calls; by default the model on its device.
        progress: where to show progress bars.

    Raises:
        ImportError: ruptures is not installed.
        ProfileError: the journal belongs to other settings, another device or other images, or cannot be continued.
        ValueError: an argument that is not allowed.
        OSError: the journal cannot be written.
    """
    need_ruptures()
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha!r}")
    if accuracy_stride < 1:
        raise ValueError(f"accuracy_stride must be at least 1, got {accuracy_stride}")
    progress = progress or Progress(disable=True)
    method, layer = settings.measured()
    own = ModelTarget(model, method, layer, graph=settings.cuda_graph, seed=settings.seed)
    device = own.device
    kinds = block_kinds(model) if settings.blocks else ()
    notes: list[str] = []
    clocks = {"before": clock_state(device)}
    with Journal(journal) as records:
        records.begin("settings", settings.to_dict())
        records.begin("device", device_facts(device))
        with own.on_device():
            notes += _measure(target or own, records, settings, kinds, progress)
        if batches:
            records.begin("accuracy", data_facts(model, batches, settings.seed))
            counts = stride_grid(settings.min_tokens, settings.num_patches, accuracy_stride)
            task = progress.add_task(f"accuracy at {len(counts)} token counts", total=len(counts))
            measure_accuracy(
                model,
                batches,
                counts,
                records,
                seed=settings.seed,
                on_count=lambda done: progress.update(task, completed=done),
            )
    clocks["after"] = clock_state(device)
    accuracy = dict(sorted(records.accuracy.items())) if batches else {}
    found = Profile(settings, environment(device), clocks, accuracy, (), ())
    if not batches:
        notes.append("no images were given: nothing says what removing tokens costs, so no R is chosen")
    built = []
    for (kind, batch_size), series in build_series(records.visits).items():
        if kind == MODEL:
            table = block_table(records.visits, kinds, batch_size, model, settings.num_patches) if kinds else None
            built.append(_batch(model, found, series, table, alpha, origin or {}))
    notes += [note for one in built for note in notes_on(one)]
    return replace(found, batches=tuple(built), notes=tuple(notes))


def _measure(
    target: Target, records: Journal, settings: Settings, kinds: tuple[str, ...], progress: Progress
) -> list[str]:
    """Warm up and visit all points; says what went not as it should."""
    grid = settings.counts()
    points = points_of((MODEL, *dict.fromkeys(kinds)), settings.batch_sizes, settings.first_counts())
    notes = []
    for batch_size in settings.batch_sizes:
        if not warm_up(target, Point(MODEL, batch_size, settings.num_patches)):
            notes.append(f"batch {batch_size}: the latency did not settle within 2 % during warm-up")

    def finer(below: Point, above: Point) -> list[Point]:
        return [below._replace(tokens=tokens) for tokens in grid if below.tokens < tokens < above.tokens]

    task = progress.add_task("latency, visits", total=len(points) * settings.rounds)
    sweep(
        target,
        records,
        points,
        Plan(settings.rounds, settings.visit_s, settings.noise_target, settings.seed),
        finer=None if settings.coarse is None else finer,
        on_visit=lambda done, needed: progress.update(task, completed=done, total=needed),
    )
    return notes


def _batch(
    model: nn.Module, found: Profile, series: Series, table: BlockTable | None, alpha: float, origin: Mapping[str, Any]
) -> BatchProfile:
    settings = found.settings
    steps = find_steps(series)
    margin = _MARGIN * series.noise
    choice: Choice | None = None
    choices: tuple[Choice, ...] = ()
    schedule: Schedule | None = None
    if found.accuracy:
        accuracy = found.accuracy_at(series.tokens)
        choice = choose(series.latency, accuracy, alpha=alpha, margin=margin)
        choices = alpha_sweep(series.latency, accuracy, margin=margin)
        schedule = _schedule(model, settings, choice, _origin(found, series, choice, origin))
    return BatchProfile(
        batch_size=series.batch_size,
        series=series,
        workload=tuple(settings.workload(series.batch_size, tokens) for tokens in series.tokens),
        steps=steps,
        verdict=verdict(series, steps),
        skipped=tuple(sorted(set(settings.counts()) - set(series.tokens))),
        blocks=table,
        margin=margin,
        choice=choice,
        sweep=choices,
        schedule=schedule,
    )


def _schedule(model: nn.Module, settings: Settings, choice: Choice, origin: dict[str, Any]) -> Schedule:
    if choice.removed == 0:
        built = Schedule.build(model, "dense")
    else:
        built = Schedule.build(model, settings.deployed(), layers=(settings.layer,), keep=[choice.tokens])
    built.origin.update(origin)
    return built


def _origin(found: Profile, series: Series, choice: Choice, more: Mapping[str, Any]) -> dict[str, Any]:
    settings, env = found.settings, found.environment
    clocks = found.clocks["after"]
    return {
        **more,
        "device": env["device"],
        "threads": env["threads"],
        "driver": clocks.get("driver_version"),
        "clocks": clocks,
        "torch": env["versions"]["torch"],
        "model": settings.model,
        "dtype": settings.dtype,
        "batch_size": series.batch_size,
        "cuda_graph": settings.cuda_graph,
        "mode": settings.mode,
        "alpha": choice.alpha,
        "removed": choice.removed,
        "dense_latency_s": choice.dense_latency_s,
        "latency_s": choice.latency_s,
        "noise": series.noise,
        "accuracy": next(iter(found.accuracy.values()))["measure"],
        "dense_accuracy": choice.dense_accuracy,
        "proxy_accuracy": choice.accuracy,
        "created": env["created"],
    }
