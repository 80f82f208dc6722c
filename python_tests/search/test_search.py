"""The search finds what is there to be found, repeats itself, and goes on after it was killed."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext import methods
from tokenprune_ext.macs import MacsShare
from tokenprune_ext.prune import apply, schedule_of
from tokenprune_ext.search import SearchError, search
from tokenprune_ext.search.objective import Objective
from tokenprune_ext.search.space import Space
from tokenprune_ext.search.study import BudgetStudy

pytest.importorskip("optuna")


class Late:
    """Stands for images on which a patch token costs the more the earlier it is removed, but for block 5."""

    def __init__(self):
        self.tried = []

    def divergences(self, schedule):
        self.tried.append(schedule)
        entering, kl = schedule.num_patches, 0.0
        for layer, count in schedule.keep.items():
            kl += (entering - count) * (0.1 if layer == 5 else 12 - layer)
            entering = count
        for _ in range(6):
            yield torch.full((4,), kl)


def study(folder: Path, settings=None, seed=0) -> BudgetStudy:
    model = make_host("vit", depth=12, img_size=112)
    space = Space.of(model, methods.create("topk"))
    return BudgetStudy(space, MacsShare(model), 0.7, folder / "trials.db", settings or {}, seed)


def test_what_is_best_is_found(tmp_path):
    """Removing at block 5 alone: a direction nobody put into the list of uniform ones."""
    found = study(tmp_path)
    found.enqueue(found.uniform())
    found.run(Late(), 80)
    trials = found.trials()
    uniform = min(trial.kl for trial in trials if trial.name.startswith("uniform"))
    assert trials[0].kl == found.least < 0.7 * uniform
    keep = trials[0].schedule.keep
    removed = [before - after for before, after in pairwise((49, *keep.values()))]
    assert max(zip(removed, keep, strict=True))[1] == 5
    assert all(trial.cost <= 0.7 for trial in trials)
    assert found.done == 80
    assert len(trials) < 80  # hopeless ones were stopped before they had seen every image


def test_the_same_seed_gives_the_same_trials(tmp_path):
    def tried(name: str, seed: int):
        (tmp_path / name).mkdir()
        objective = Late()
        study(tmp_path / name, seed=seed).run(objective, 15)
        return objective.tried

    first = tried("a", 0)
    assert first == tried("b", 0)
    assert first != tried("c", 1)


def test_an_interrupted_search_goes_on(tmp_path):
    """Nothing is tried twice, no random draw comes again, what was in work is given up and tried anew."""
    objective = Late()
    first = study(tmp_path)
    first.enqueue(first.uniform())
    first.run(objective, 8)
    first._study.ask()  # a trial whose process was killed
    again = study(tmp_path)
    again.recover()
    assert [trial.state.name for trial in again._study.trials].count("FAIL") == 1
    again.enqueue(again.uniform())
    again.run(objective, 25)
    assert again.done == 25
    assert len(objective.tried) == len({json.dumps(schedule.keep) for schedule in objective.tried})
    assert [trial.name for trial in again.trials()].count("uniform at 3, 6, 9") == 1


def test_no_trial_is_tried_twice(tmp_path):
    """SQLite locks no rows, so Optuna alone gives a waiting trial to two processes that ask at once."""
    study(tmp_path).enqueue({str(number): {"block 1": 0.0} for number in range(40)})
    searches = [study(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda number: searches[number % 4]._next(40).number, range(40)))
    assert sorted(asked) == list(range(40))
    assert searches[0]._next(40) is None


def test_another_search_is_refused(tmp_path):
    study(tmp_path, {"model": "m", "seed": 1})
    study(tmp_path, {"model": "m", "seed": 1})
    with pytest.raises(SearchError, match=r"trials.db holds a search with seed 1, not 2: go on with the same settings"):
        study(tmp_path, {"model": "m", "seed": 2})


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"the search needs Optuna: pip install 'tokenprune\[search\]'"):
        study(tmp_path)


def run(folder: Path, **options):
    model = make_host("vit").eval()
    space = Space.of(model, methods.create("topk"), tune={"reduction": ["drop", "merge"]})
    images = images_for(model, 12)
    labels = torch.arange(4) % 10
    given = {"trials": 12, "batch_size": 4, "held_out": (images_for(model, 4, seed=1), labels), **options}
    return model, search(model, space, MacsShare(model), [0.8, 0.6], images, storage=folder / "trials.db", **given)


def test_a_whole_search(tmp_path):
    progress = []
    model, result = run(tmp_path, on_progress=lambda *args: progress.append(args))
    assert result.trials == {0.8: 12, 0.6: 12}
    for budget, best in zip((0.8, 0.6), result.best, strict=True):
        assert best.name == "searched"
        assert best.budget == budget
        assert best.cost <= budget
        rivals = [variant for variant in result.uniform if variant.budget == budget]
        assert rivals
        assert best.kl <= min(rival.kl for rival in rivals)
        assert best.kl == pytest.approx(Objective(model, images_for(model, 12), 4).kl(best.schedule), rel=1e-5)
        assert best.held_out.images == 4
        assert best.schedule.origin["search"]["trials"] == 12
        assert best.schedule.origin["search"]["kl"] == best.kl
    assert [trial.cost for trial in result.front] == sorted(trial.cost for trial in result.front)
    assert [trial.kl for trial in result.front] == sorted((trial.kl for trial in result.front), reverse=True)
    assert progress[-1][:2] == (0.6, 12)
    with pytest.raises(ValueError, match="not pruned"):
        schedule_of(model)  # it is as it was
    assert schedule_of(apply(model, result.best[1].schedule)) == result.best[1].schedule
    assert json.loads(json.dumps(result.to_dict()))["trials"] == {"0.8": 12, "0.6": 12}
    _, again = run(tmp_path)
    assert again.best[0].kl == result.best[0].kl


def test_processes_share_the_trials(tmp_path):
    _, result = run(tmp_path, jobs=2, held_out=None)
    assert result.trials == {0.8: 12, 0.6: 12}
    assert result.best[0].held_out is None
    assert result.best[0].kl <= min(variant.kl for variant in result.uniform if variant.budget == 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"trials": 0}, "trials must be at least 1"), ({"jobs": 0}, "jobs must be"), ({"batch_size": 0}, "batch_size")],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_budget_out_of_reach(tmp_path):
    model = make_host("vit").eval()
    space = Space.of(model, methods.create("tome"))
    with pytest.raises(ValueError, match=r"budgets has 0.1, which tome did not reach in 3 trials"):
        search(model, space, MacsShare(model), [0.1], images_for(model), storage=tmp_path / "t.db", trials=3)
    with pytest.raises(ValueError, match=r"budgets must be in \(0, 1\], got 1.5"):
        search(model, space, MacsShare(model), [1.5], images_for(model), storage=tmp_path / "t.db")


def finished(path: Path) -> int:
    if not path.exists():
        return 0
    with sqlite3.connect(path) as database:
        if not database.execute("select 1 from sqlite_master where name = 'trials'").fetchall():
            return 0
        return database.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_command_goes_on(tmp_path, inputs, jobs):
    """SIGKILL in the middle; no process stays behind, and the second run finishes what the first began."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tokenprune_ext.cli", "search", "--model", "test_vit", "--img-size", "64"]
    command += ["--weights", str(inputs / "w.safetensors"), "--data", str(inputs / "images.tsv"), "--jobs", str(jobs)]
    command += ["--method", "topk", "--budget-macs=-30%", "--trials", "40", "--batch-size", "2", "--threads", "1"]
    command += ["--output", str(output)]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while finished(output / "trials.db") < 5:
        assert first.poll() is None, first.stderr.read()
        assert time.time() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    before = finished(output / "trials.db")
    time.sleep(1)
    assert finished(output / "trials.db") == before  # nobody is at work
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert 40 <= finished(output / "trials.db") <= 40 + jobs - 1
    assert (output / "schedule-0.7.json").exists()


def test_tuned_values_need_not_hold_the_methods_own(tmp_path):
    """The uniform schedules are tried all the same, at the first of the values."""
    model = make_host("vit").eval()
    space = Space.of(model, methods.create("zero_tprune", similar=0), tune={"tau": [0.5, 0.7]})
    images = images_for(model, 4)
    result = search(model, space, MacsShare(model), [0.8], images, storage=tmp_path / "t.db", trials=6, batch_size=2)
    assert result.uniform
    assert {variant.schedule.options["tau"] for variant in result.uniform} == {0.5}
    assert result.best[0].schedule.options["tau"] in (0.5, 0.7)
