"""Everything that can only be checked on a GPU, in one command: tests, sanitizers, benchmarks, whole models.

Records go to bench/results/<device>/. A step that fails or takes too long is reported at the end, with exit code 1, and
the others still run; without a CUDA device the exit code is 2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from tokenprune_ext.environment import environment

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
MINUTES = 9.5
GROUPS = ("tests", "sanitizer", "bench", "end-to-end")
NO_SANITIZER = "compute-sanitizer is not installed; it comes with the CUDA toolkit"

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds; with ``skip``, the reason why it cannot be run."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    cwd: Path = ROOT
    skip: str = ""


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    seconds: float = 0.0
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.state in (FAILED, TIMED_OUT)


def steps(groups: tuple[str, ...], folder: Path) -> list[Step]:
    """The steps of the groups; benchmarks are all bench_*.py there are. Records go to the folder."""
    found = []
    if "tests" in groups:
        # Not from the root, where Python would import the source tree and not what is installed.
        command = (sys.executable, "-m", "pytest", "ops", "patch/test_cuda_graphs.py", "-k", "cuda", "-q")
        found.append(Step("tests", command, 180, cwd=ROOT / "python_tests"))
    if "sanitizer" in groups:
        found += [_sanitizer(tool) for tool in ("memcheck", "racecheck")]
    if "bench" in groups:
        for script in sorted(BENCH.glob("bench_*.py")):
            name = script.stem.removeprefix("bench_")
            output = ("--output", str(folder / f"{name}.jsonl"))
            options = ("--device", "cuda", "--budget", "0.02", "--stop-after", "15", *output)
            found.append(Step(name, (sys.executable, str(script), *options), 60))
    if "end-to-end" in groups:
        options = ("--device", "cuda", "--budget", "1", "--output", str(folder / "end_to_end.jsonl"))
        found.append(Step("end-to-end", (sys.executable, str(BENCH / "end_to_end.py"), *options), 300))
        eager = ("--compiler", "eager", "--output", str(folder / "selection_cost.jsonl"))
        command = (sys.executable, str(BENCH / "selection_cost.py"), "--device", "cuda", "--budget", "1", *eager)
        found.append(Step("selection cost", command, 90))
    return found


def _sanitizer(tool: str) -> Step:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    options = ("--tool", tool, "--error-exitcode", "1")
    command = (program or "", *options, sys.executable, str(BENCH / "operator_calls.py"), "cuda")
    return Step(tool, command, 90, skip="" if program else NO_SANITIZER)


def run_step(step: Step, limit_s: float) -> Outcome:
    """Run the command to its end or its limit; whatever it started ends with it."""
    if step.skip:
        return Outcome(step.name, SKIPPED, note=step.skip)
    # The kernels have to be there; and without torch's cache an access out of a tensor is one out of an allocation.
    extra = {"TOKENPRUNE_REQUIRE_EXT": "cuda"}
    if step.name == "memcheck":
        extra["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.perf_counter()
    try:
        process = subprocess.Popen(step.command, cwd=step.cwd, env={**os.environ, **extra}, start_new_session=True)
    except OSError as error:
        return Outcome(step.name, FAILED, note=str(error))
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return Outcome(step.name, TIMED_OUT, time.perf_counter() - start, f"stopped after {limit_s:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - start
    return Outcome(step.name, FAILED, seconds, f"exit code {code}") if code else Outcome(step.name, PASSED, seconds)


def run_steps(chosen: list[Step], total_s: float) -> list[Outcome]:
    """One after the other, each within its own limit and within what is left of the total."""
    end = time.perf_counter() + total_s
    outcomes = []
    for step in chosen:
        left = end - time.perf_counter()
        click.echo(f"\n=== {step.name}")
        timely = left > 0 or step.skip
        outcome = run_step(step, min(step.limit_s, left)) if timely else Outcome(step.name, TIMED_OUT, 0, "not begun")
        outcomes.append(outcome)
    return outcomes


def show(outcomes: list[Outcome]) -> None:
    table = Table("step", "outcome", "seconds", "note")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.1f}", outcome.note)
    Console(width=120).print(table)


def folder_of(device: str) -> Path:
    """``NVIDIA A100-SXM4-80GB`` -> ``results/nvidia-a100-sxm4-80gb``."""
    return RESULTS / "-".join("".join(letter if letter.isalnum() else " " for letter in device.lower()).split())


def write(file: Path, where: dict[str, Any], outcomes: list[Outcome]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": where, "steps": [asdict(outcome) for outcome in outcomes]}
    file.write_text(json.dumps(content, indent=1) + "\n")


@click.command(help=__doc__)
@click.option("--steps", "groups", type=click.Choice(GROUPS), multiple=True, help="Only these; repeatable.")
@click.option("--minutes", default=MINUTES, show_default=True, help="For all steps; their own limits grow with it.")
def main(groups: tuple[str, ...], minutes: float) -> None:
    if not torch.cuda.is_available():
        click.echo("gpu_check needs a CUDA device, and torch finds none here", err=True)
        sys.exit(2)
    where = environment(torch.device("cuda"))
    folder = folder_of(where["device"])
    click.echo(json.dumps(where, indent=1))
    chosen = [replace(step, limit_s=step.limit_s * minutes / MINUTES) for step in steps(groups or GROUPS, folder)]
    outcomes = run_steps(chosen, minutes * 60)
    show(outcomes)
    write(folder / "gpu_check.json", where, outcomes)
    click.echo(f"records are in {folder}; python bench/summary.py {folder} shows them")
    sys.exit(int(any(outcome.bad for outcome in outcomes)))


if __name__ == "__main__":
    main()
