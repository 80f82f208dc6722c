"""The harness of all microbenchmarks: check first, then time the variants of a case in turn, then print and record.

A benchmark lists cases; each case has the kernel under test, its plain-torch reference and whatever else it is compared
with. All variants of a case run interleaved, so that drift of the machine meets them alike: quote their ratios.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from tokenprune_ext.environment import environment
from tokenprune_ext.latency import quantile, time_in_turns

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One shape and dtype.

    Attributes:
        op: operator.
        shape: named sizes, e.g. ``{"B": 8, "H": 6, "N": 197}``, and what else belongs in the record.
        dtype: dtype of the inputs.
        variants: name -> call; the first is the kernel, the others compute the same and are compared with it.
        baselines: name -> call; timed in the same run, but they compute something else.
        bytes_moved: each input read once and each output written once: what the floor is made of.
        tolerance: largest allowed relative difference between the variants' results.
    """

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype
    variants: dict[str, Callable[[], Any]]
    bytes_moved: int
    tolerance: float = 1e-4
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    device: str = field(default="cpu")


def check(case: Case) -> None:
    """All variants give the same result; raises AssertionError otherwise."""
    calls = list(case.variants.values())
    expected = calls[0]()
    for call in calls[1:]:
        torch.testing.assert_close(call(), expected, rtol=case.tolerance, atol=case.tolerance)


def measure(case: Case, budget_s: float) -> list[dict[str, Any]]:
    """One record a variant; times in seconds, ``ratio`` is its median over the kernel's."""
    check(case)
    times = time_in_turns({**case.variants, **case.baselines}, cuda=case.device == "cuda", budget_s=budget_s)
    kernel = quantile(next(iter(times.values())), 0.5)
    return [
        {
            "op": case.op,
            "variant": name,
            **case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "median_s": quantile(rounds, 0.5),
            "q20_s": quantile(rounds, 0.2),
            "q80_s": quantile(rounds, 0.8),
            "rounds": len(rounds),
            "ratio": quantile(rounds, 0.5) / kernel,
            "gb_per_s": case.bytes_moved / quantile(rounds, 0.5) / 1e9,
        }
        for name, rounds in times.items()
    ]


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    table = Table("case", "dtype", "variant", "median ms", "20 % - 80 %", "of the kernel's time", "GB/s", title=title)
    previous = ""
    for record in records:
        keys = [key for key in record if key.isupper() or key == "iters"]
        name = " ".join(f"{key}={record[key]}" for key in keys)
        spread = f"{record['q20_s'] * 1e3:.3f} - {record['q80_s'] * 1e3:.3f}"
        same = name + record["dtype"] == previous
        table.add_row(
            "" if same else name,
            "" if same else record["dtype"],
            record["variant"],
            f"{record['median_s'] * 1e3:.3f}",
            spread,
            f"{record['ratio']:.2f} x",
            f"{record['gb_per_s']:.1f}",
        )
        previous = name + record["dtype"]
    return table


def main(op: str, doc: str, cases: Callable[[str], Iterable[Case]]) -> None:
    """The command line of one benchmark. ``cases`` gets the device, ``cpu`` or ``cuda``."""

    @click.command(help=doc)
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads(), show_default=True)
    @click.option("--budget", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds a case.")
    @click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
    def command(device: str, threads: int, budget: float, output: Path | None) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        where = environment(torch.device(device))
        records = [record for case in cases(device) for record in measure(case, budget)]
        Console(width=140).print(_table(f"{op} on {where['device']}, {threads} threads", records))
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                for record in records:
                    file.write(json.dumps({**record, "commit": _commit(), "environment": where}) + "\n")

    command()
