"""What the check of a new GPU does where there is none: it refuses, runs its steps and reports them; whole models."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from host_models import make_host

from tokenprune_ext import methods


@pytest.fixture(scope="module")
def check(bench: Path) -> ModuleType:
    return importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def whole(bench: Path) -> ModuleType:
    return importlib.import_module("end_to_end")


def python(check: ModuleType, name: str, code: str, limit_s: float = 60.0) -> Any:
    return check.Step(name, (sys.executable, "-c", code), limit_s)


def test_refuses_without_a_device(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(check.main, [])
    assert result.exit_code == 2
    assert result.output == "gpu_check needs a CUDA device, and torch finds none here\n"


def test_failures_and_time_outs_are_reported_and_the_rest_still_runs(check: ModuleType, tmp_path: Path) -> None:
    outcomes = check.run_steps(
        [
            python(check, "fails", "raise SystemExit(3)"),
            python(check, "hangs", "import time; time.sleep(60)", limit_s=0.2),
            check.Step("missing", (str(tmp_path / "no program"),), 60),
            check.Step("skipped", (), 60, skip="not installed"),
            python(check, "works", "pass"),
        ],
        60,
    )
    assert [outcome.state for outcome in outcomes] == ["failed", "timed out", "failed", "skipped", "passed"]
    assert [outcome.bad for outcome in outcomes] == [True, True, True, False, False]
    assert outcomes[0].note == "exit code 3"
    assert "no program" in outcomes[2].note
    assert outcomes[3].note == "not installed"


def test_a_time_out_ends_what_the_step_started(check: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (outcome,) = check.run_steps([python(check, "hangs", code, limit_s=0.5)], 60)
    assert outcome.state == "timed out"
    time.sleep(1.5)
    assert not mark.exists()


def test_nothing_begins_after_the_last_minute(check: ModuleType) -> None:
    (outcome,) = check.run_steps([python(check, "late", "pass")], 0)
    assert (outcome.state, outcome.note) == ("timed out", "not begun")


@pytest.mark.parametrize(("code", "exit_code"), [("pass", 0), ("raise SystemExit(1)", 1)])
def test_exit_code_and_report(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, exit_code: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "environment", lambda device: {"device": "Some GPU-80GB (new)"})
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    monkeypatch.setattr(check, "steps", lambda groups, folder: [python(check, groups[0], code)])
    result = CliRunner().invoke(check.main, ["--steps", "bench"])
    assert result.exit_code == exit_code
    report = json.loads((tmp_path / "some-gpu-80gb-new" / "gpu_check.json").read_text())
    assert report["environment"] == {"device": "Some GPU-80GB (new)"}
    assert [step["name"] for step in report["steps"]] == ["bench"]


def test_steps(check: ModuleType, bench: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every benchmark is found; the sanitizer is skipped, with its reason, where it is not installed."""
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: None)
    found = {step.name: step for step in check.steps(check.GROUPS, tmp_path)}
    assert found.keys() >= {"tests", "memcheck", "racecheck", "wpr", "topk_gather", "end-to-end", "selection cost"}
    assert {path.stem.removeprefix("bench_") for path in bench.glob("bench_*.py")} <= found.keys()
    assert "not installed" in found["memcheck"].skip
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: f"/bin/{name}")
    memcheck, racecheck = check.steps(("sanitizer",), tmp_path)
    assert memcheck.command[:3] == ("/bin/compute-sanitizer", "--tool", "memcheck")
    assert (memcheck.skip, racecheck.skip) == ("", "")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_end_to_end_on_a_tiny_model(whole: ModuleType, compiler: str) -> None:
    setting = whole.Setting("deit", 2, compiler)
    dense, *pruned = whole.end_to_end(make_host("deit"), setting, "cpu", torch.float32, budget_s=0.0)
    assert (dense["method"], dense["speedup"], dense["ideal"]) == ("dense", 1, 1)
    assert {record["method"] for record in pruned} == {whole.CLASS_TOKEN, *methods.available()} - {"dense"}
    for record in pruned:
        assert record["ideal"] > 1
        assert record["of_ideal"] == pytest.approx(record["speedup"] / record["ideal"])
        assert record["blocks_macs_fraction"] <= whole.MACS or record["method"] == whole.CLASS_TOKEN
        shares = [record[key] for key in whole.SHARES if key in record]
        if compiler != "eager":
            assert not shares
        elif record["method"] == whole.CLASS_TOKEN:
            assert shares == [0, 0, 0]
        else:
            assert len(shares) == 3
            assert all(0 < share < 1 for share in shares)
