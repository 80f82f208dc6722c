"""A whole search: budgets one after the other, processes side by side, and the verdict on images it has not seen."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tokenprune_ext.compare import share
from tokenprune_ext.evaluate import Accuracy, evaluate
from tokenprune_ext.info import collect
from tokenprune_ext.prune import apply
from tokenprune_ext.schedule import Schedule

from .objective import Objective
from .space import Cost, Space
from .study import BudgetStudy, SearchError, Trial

_POLL_S = 0.5


@dataclass(frozen=True)
class Variant:
    """One schedule on the images that the search has not seen; see `Trial` for the first four.

    Attributes:
        kl: mean KL(dense || pruned) on the search images, in nats.
        held_out: accuracy on the others, against the dense model; None when none were held out.
    """

    name: str
    budget: float
    cost: float
    kl: float
    schedule: Schedule
    held_out: Accuracy | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: for every budget, the schedule with the least divergence on the search images.
        uniform: the schedules with one keep ratio at some usual sets of blocks, at the same budgets.
        front: trials of all budgets that no other beats in both cost and divergence on the search images, by cost.
        trials: finished trials by budget, those that were stopped early among them.
    """

    best: tuple[Variant, ...]
    uniform: tuple[Variant, ...]
    front: tuple[Trial, ...]
    trials: dict[float, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "best": [asdict(variant) for variant in self.best],
            "uniform": [asdict(variant) for variant in self.uniform],
            "front": [asdict(trial) for trial in self.front],
            "trials": {f"{budget:g}": count for budget, count in self.trials.items()},
        }


def search(
    model: nn.Module,
    space: Space,
    cost: Cost,
    budgets: Sequence[float],
    images: Tensor,
    *,
    storage: Path,
    held_out: tuple[Tensor, Tensor] | None = None,
    trials: int = 200,
    batch_size: int = 25,
    jobs: int = 1,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    on_progress: Callable[[float, int, float | None], None] | None = None,
) -> SearchResult:
    """Find the schedules of least divergence from the dense model at every budget.

    Args:
        model: the dense model, in eval mode.
        space: what is varied, see `Space.of`.
        cost: what a schedule costs, as a share of the dense model: `macs.MacsShare` or `latency.LatencyShare`.
        budgets: largest allowed costs, each in (0, 1]; the best of one is tried first at the next.
        images: search images ``[M, 3, H, W]``, on the model's device and in its dtype. Labels are not used.
        storage: SQLite file of the trials. An interrupted search goes on where it was.
        held_out: images ``[K, 3, H, W]`` and labels ``[K]`` (-1 for none) to judge the outcome on.
        trials: finished trials a budget, those of earlier runs among them.
        batch_size: images per forward.
        jobs: processes that try schedules side by side. With one, the same seed gives the same trials.
        seed: of Optuna's sampler.
        settings: what else decides the outcome and has to be the same when a search goes on.
        on_progress: called with the budget, its finished trials and the least divergence so far.

    Raises:
        ValueError: a budget outside (0, 1], or one that no tried schedule meets.
        SearchError: Optuna is missing, the storage is of another search, or a process failed.
    """
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"budgets must be in (0, 1], got {budget}")
    for name, value in (("trials", trials), ("jobs", jobs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    made = {
        **(settings or {}),
        "method": space.method.name,
        "options": space.method.options(),
        "layers": space.layers,
        "tune": space.tune,
        "images": len(images),
        "batch_size": batch_size,
    }
    known: dict[str, dict[str, Any]] = {}
    found: dict[float, list[Trial]] = {}
    counts = {}
    for budget in budgets:
        open_study = partial(BudgetStudy, space, cost, budget, storage, made)
        study = open_study(seed)
        study.recover()
        study.enqueue({**study.uniform(), **known})
        _run(study, open_study, model, images, batch_size, trials, jobs, seed, on_progress)
        found[budget], counts[budget] = study.trials(), study.done
        if not found[budget]:
            raise ValueError(f"budgets has {budget}, which {space.method.name} did not reach in {study.done} trials")
        known = {f"best at {budget:g}": study.best()}
    every = [trial for tried in found.values() for trial in tried]
    best = [replace(tried[0], name="searched") for tried in found.values()]
    uniform = [trial for trial in every if trial.name.startswith("uniform")]
    judged = _judge(model, [*best, *uniform], held_out, batch_size)
    versions = {
        name: version for name, version in collect()["versions"].items() if name in ("tokenprune", "torch", "timm")
    }
    found_on = {"images": len(images), "trials": counts, "seed": seed, "versions": versions}
    return SearchResult(
        best=tuple(_with_origin(variant, found_on) for variant in judged[: len(best)]),
        uniform=tuple(judged[len(best) :]),
        front=tuple(_front(every)),
        trials=counts,
    )


def _run(
    study: BudgetStudy,
    open_study: Callable[[int], BudgetStudy],
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    trials: int,
    jobs: int,
    seed: int,
    on_progress: Callable[[float, int, float | None], None] | None,
) -> None:
    """Bring a study to so many trials, in this process or in several others."""

    def show() -> None:
        if on_progress is not None:
            on_progress(study.budget, study.done, study.least)

    show()
    if study.done >= trials:
        return
    if jobs == 1:
        study.run(Objective(model, images, batch_size), trials, show)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = mp.get_context("spawn")
    arguments = (model, images, batch_size, trials, threads)
    workers = [
        context.Process(target=_work, args=(open_study, seed + 100_003 * job, *arguments), daemon=True)
        for job in range(jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.join(_POLL_S / jobs)
            show()
        failed = [worker.exitcode for worker in workers if worker.exitcode]
    finally:
        for worker in workers:
            worker.terminate()
    if failed:
        raise SearchError(f"a search process ended with exit code {failed[0]}; its message is above")


def _work(
    open_study: Callable[[int], BudgetStudy],
    seed: int,
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    trials: int,
    threads: int,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    open_study(seed).run(Objective(model, images, batch_size), trials)


def _end_with_parent() -> None:
    """Also when the parent is killed: trials of a process left behind would meet those of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _front(trials: Sequence[Trial]) -> list[Trial]:
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.cost, trial.kl)):
        if not front or trial.kl < front[-1].kl:
            front.append(trial)
    return front


def _judge(
    model: nn.Module, trials: Sequence[Trial], held_out: tuple[Tensor, Tensor] | None, batch_size: int
) -> list[Variant]:
    accuracy: dict[str, Accuracy] = {}
    if held_out is not None:
        images, labels = held_out
        variants = {"dense": model}
        for number, trial in enumerate(trials):
            variants[str(number)] = apply(share(model), trial.schedule)
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        accuracy = evaluate(variants, batches, device=images.device, dtype=images.dtype)
    return [
        Variant(trial.name, trial.budget, trial.cost, trial.kl, trial.schedule, accuracy.get(str(number)))
        for number, trial in enumerate(trials)
    ]


def _with_origin(variant: Variant, found_on: dict[str, Any]) -> Variant:
    """The variant, its schedule saying how it was found."""
    held_out = None if variant.held_out is None else asdict(variant.held_out)
    found = {"budget": variant.budget, "cost": variant.cost, "kl": variant.kl, "held_out": held_out}
    origin = {"search": {**found, **found_on, "trials": found_on["trials"][variant.budget]}}
    return replace(variant, schedule=replace(variant.schedule, origin=origin))
