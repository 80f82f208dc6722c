"""Optuna looks for the direction of least divergence; every trial meets the budget."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tokenprune_ext.methods import Method
from tokenprune_ext.schedule import Schedule

from .objective import Objective
from .space import Cost, Space

_INSTALL = "the search needs Optuna: pip install 'tokenprune[search]'"


class SearchError(RuntimeError):
    """A search that cannot run or go on; the message says why."""


@dataclass(frozen=True)
class Trial:
    """One schedule that was tried on all search images.

    Attributes:
        name: "searched", or what the uniform schedule it is is called.
        budget: the budget it was made for, as a share of the dense model's cost.
        cost: what it costs, the same way.
        kl: mean KL(dense || pruned) on the search images, in nats.
        schedule: the schedule.
    """

    name: str
    budget: float
    cost: float
    kl: float
    schedule: Schedule


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        SearchError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SearchError(_INSTALL) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return optuna


class BudgetStudy:
    """The trials at one budget, in a SQLite file that several processes share and an interrupted search goes on with.

    Args:
        space: what is varied.
        cost: what a schedule costs.
        budget: largest allowed cost, as a share of the dense model's.
        storage: SQLite file; made when it is not there.
        settings: what else decides the outcome; a file made with other settings is refused.
        seed: of the sampler.

    Raises:
        SearchError: Optuna is missing; the file is from a search with other settings.
    """

    def __init__(
        self, space: Space, cost: Cost, budget: float, storage: Path, settings: Mapping[str, Any], seed: int
    ) -> None:
        optuna = import_optuna()
        self.space, self.cost, self.budget = space, cost, budget
        self._lock = f"{storage}.lock"
        # Workers start together: a connection waits while another one writes.
        backend = optuna.storages.RDBStorage(f"sqlite:///{storage}", engine_kwargs={"connect_args": {"timeout": 60}})
        self._study = optuna.create_study(
            storage=backend,
            study_name=f"{budget:.6g}",
            load_if_exists=True,
            direction="minimize",
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
        )
        self._check(storage, json.loads(json.dumps(settings)))
        # One that goes on must not draw again what it began with.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + self.done, multivariate=True)

    def _check(self, storage: Path, settings: dict[str, Any]) -> None:
        made = self._study.user_attrs.get("settings")
        if made is None:
            self._study.set_user_attr("settings", settings)
            return
        for name in sorted(made.keys() | settings.keys()):
            if made.get(name) != settings.get(name):
                raise SearchError(
                    f"{storage} holds a search with {name} {made.get(name)!r}, not {settings.get(name)!r}: go on with "
                    "the same settings, or choose another --output"
                )

    @property
    def done(self) -> int:
        """Trials that are finished, those that were stopped early among them."""
        states = import_optuna().trial.TrialState
        return len(self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))

    def recover(self) -> None:
        """Give up trials that a killed process left unfinished. No other process may be at work."""
        states = import_optuna().trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self._study.tell(trial.number, state=states.FAIL)

    def enqueue(self, candidates: Mapping[str, Mapping[str, Any]]) -> None:
        """Have these parameters tried first, under their names; those of an earlier run are not repeated."""
        states = import_optuna().trial.TrialState
        kept = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.WAITING))
        known = {trial.user_attrs.get("name") for trial in kept}
        for name, params in candidates.items():
            if name not in known:
                self._study.enqueue_trial(dict(params), user_attrs={"name": name})

    def uniform(self) -> dict[str, dict[str, Any]]:
        """Parameters of the schedules that a person would try, by name.

        Tuned options have the method's own value, or the first of theirs where that is not among them.
        """
        options, own = self.space.method.options(), {}
        for name in self.space.tune:
            choices = self._choices(name)
            mine = json.dumps(options[name])
            own[name] = mine if mine in choices else choices[0]
        return {
            name: {**own, **{_parameter(layer): direction.get(layer, 0.0) for layer in self.space.layers}}
            for name, direction in self.space.uniform().items()
        }

    def run(self, objective: Objective, trials: int, on_trial: Callable[[], None] | None = None) -> None:
        """Try schedules until ``trials`` are finished, by all processes together."""
        optuna = import_optuna()
        states = optuna.trial.TrialState
        while (trial := self._next(trials)) is not None:
            try:
                value = self._try(trial, objective)
            except optuna.TrialPruned:
                self._study.tell(trial, state=states.PRUNED)
            except BaseException:
                self._study.tell(trial, state=states.FAIL)
                raise
            else:
                self._study.tell(trial, value, state=states.COMPLETE)
            if on_trial is not None:
                on_trial()

    def _next(self, trials: int) -> Any:
        """A trial for this process; None when ``trials`` are finished or at work.

        SQLite locks no rows: without the lock, two processes may be given the same waiting trial.
        """
        states = import_optuna().trial.TrialState
        with FileLock(self._lock):
            taken = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING))
            return self._study.ask() if len(taken) < trials else None

    def trials(self) -> list[Trial]:
        """The trials that saw all images, best first."""
        done = import_optuna().trial.TrialState.COMPLETE
        found = []
        for trial in self._study.get_trials(deepcopy=False, states=(done,)):
            direction, method = self._read(trial.params)
            schedule = self.space.schedule(direction, method, self.budget, self.cost)
            assert schedule is not None
            assert trial.value is not None
            name = trial.user_attrs.get("name", "searched")
            found.append(Trial(name, self.budget, self.cost(schedule.keep, method), trial.value, schedule))
        return sorted(found, key=lambda trial: trial.kl)

    @property
    def least(self) -> float | None:
        """The least divergence so far; None before the first finished trial."""
        best = self._best()
        return None if best is None else float(best.value)

    def best(self) -> dict[str, Any]:
        """Parameters of the best trial."""
        best = self._best()
        assert best is not None
        return dict(best.params)

    def _best(self) -> Any:
        done = import_optuna().trial.TrialState.COMPLETE
        found = self._study.get_trials(deepcopy=False, states=(done,))
        return min(found, key=lambda trial: trial.value, default=None)

    def _try(self, trial: Any, objective: Objective) -> float:
        for layer in self.space.layers:
            trial.suggest_float(_parameter(layer), -0.5, 1.0)  # a third of the range: does not prune
        for name in self.space.tune:
            trial.suggest_categorical(name, self._choices(name))
        direction, method = self._read(trial.params)
        schedule = self.space.schedule(direction, method, self.budget, self.cost)
        stop = import_optuna().TrialPruned
        if schedule is None:
            raise stop("the budget is out of reach in this direction")
        seen = []
        for step, kl in enumerate(objective.divergences(schedule)):
            seen.append(kl)
            trial.report(float(kl.mean()), step)
            if "name" not in trial.user_attrs and trial.should_prune():  # worse than the best on the same images
                raise stop()
        return float(torch.cat(seen).mean())

    def _choices(self, name: str) -> list[str]:
        """The values of a tuned option, as the study holds them."""
        return [json.dumps(choice) for choice in self.space.tune[name]]

    def _read(self, params: Mapping[str, Any]) -> tuple[dict[int, float], Method]:
        direction = {layer: params[_parameter(layer)] for layer in self.space.layers}
        return direction, self.space.variant({name: json.loads(params[name]) for name in self.space.tune})


def _parameter(layer: int) -> str:
    return f"block {layer}"
