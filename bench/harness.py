"""The harness of all microbenchmarks: check first, then time the variants of a case in turn, then print and record.

A benchmark lists cases; each case has the kernel under test, its plain-torch reference and whatever else it is compared
with. All variants of a case run interleaved, so that drift of the machine meets them alike: quote their ratios.
"""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from floors import rates
from rich.console import Console
from rich.table import Table

from tokenprune_ext.cuda_graph import cuda_graph
from tokenprune_ext.environment import environment
from tokenprune_ext.info import has_kernel
from tokenprune_ext.latency import quantile, time_in_turns

KERNEL = "kernel"
GRAPH = "kernel, CUDA graph"
READ = "torch.sum"  # a baseline: the input is read once, and nothing else


@dataclass(frozen=True)
class Case:
    """One shape and dtype.

    Attributes:
        op: operator.
        shape: named sizes, e.g. ``{"B": 8, "H": 6, "N": 197}``, and what else belongs in the record.
        dtype: dtype of the inputs.
        variants: name -> call; ``kernel``, and what computes the same and is compared with it, e.g. ``reference``.
        baselines: name -> call; timed in the same run, but they compute something else.
        bytes_moved: each input read once and each output written once: one part of the floor.
        flops: operations of the matrix products that cannot be avoided: the other part of the floor.
        compared: what of a result the variants must agree in; everything by default.
        tolerance: largest allowed relative difference between the variants' results.
    """

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype
    variants: dict[str, Callable[[], Any]]
    bytes_moved: int
    flops: int = 0
    compared: Callable[[Any], Any] = lambda result: result
    tolerance: float = 1e-4
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    device: str = field(default="cpu")


def check(case: Case, variants: dict[str, Callable[[], Any]]) -> None:
    """All variants give the same result; raises AssertionError otherwise."""
    expected = case.compared(variants[KERNEL]())
    for call in variants.values():
        torch.testing.assert_close(case.compared(call()), expected, rtol=case.tolerance, atol=case.tolerance)


def measure(case: Case, budget_s: float) -> list[dict[str, Any]]:
    """One record a variant; times in seconds, ``ratio`` is its median over the kernel's."""
    cuda = case.device == "cuda"
    variants = dict(case.variants)
    with torch.inference_mode():  # as a model's forward pass: else torch looks for gradients, in Python, in every call
        if cuda:
            variants[GRAPH] = cuda_graph(variants[KERNEL])
        check(case, variants)
        times = time_in_turns({**variants, **case.baselines}, cuda=cuda, budget_s=budget_s)
    kernel = quantile(times[KERNEL], 0.5)
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
            **(_against_floor(case, quantile(rounds, 0.5)) if name in variants else {}),
        }
        for name, rounds in times.items()
    ]


def _against_floor(case: Case, seconds: float) -> dict[str, float]:
    """Not for baselines: they compute something else, with other bytes and operations."""
    best = rates(case.device, case.dtype)
    floor = best.floor_s(case.bytes_moved, case.flops)
    return {
        "gb_per_s": case.bytes_moved / seconds / 1e9,
        "tflop_per_s": case.flops / seconds / 1e12,
        "copy_gb_per_s": best.bytes_per_s / 1e9,
        "matmul_tflop_per_s": best.flop_per_s / 1e12,
        "floor_s": floor,
        "time_over_floor": seconds / floor,
    }


def shape_text(record: dict[str, Any]) -> str:
    """The sizes of a record's case, which stand between its variant and its dtype."""
    keys = list(record)
    return " ".join(f"{key}={record[key]}" for key in keys[keys.index("variant") + 1 : keys.index("dtype")])


@functools.cache
def commit() -> str | None:
    """The commit of the source tree, if it is one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    columns = ("median ms", "20 % - 80 %", "of the kernel's time", "GB/s", "TFLOP/s", "time/floor")
    table = Table("case", "dtype", "variant", *columns, title=title)
    previous = ""
    for record in records:
        name = shape_text(record)
        same = name + record["dtype"] == previous
        table.add_row(
            "" if same else name,
            "" if same else record["dtype"],
            record["variant"],
            f"{record['median_s'] * 1e3:.3f}",
            f"{record['q20_s'] * 1e3:.3f} - {record['q80_s'] * 1e3:.3f}",
            f"{record['ratio']:.2f} x",
            *(f"{record[key]:.2f}" if key in record else "" for key in ("gb_per_s", "tflop_per_s", "time_over_floor")),
        )
        previous = name + record["dtype"]
    return table


def append(output: Path, records: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """One record a line, each with the commit and where it was measured."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for record in records:
            file.write(json.dumps({**record, "commit": commit(), "environment": where}) + "\n")


def main(op: str, doc: str, cases: Callable[[str], Iterable[Case]], *, compiled: bool = True) -> None:
    """The command line of one benchmark. ``cases`` gets the device, ``cpu`` or ``cuda``.

    With ``compiled`` the operator must have a compiled kernel; a benchmark of torch's own functions says False.
    """

    @click.command(help=doc)
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads(), show_default=True)
    @click.option("--budget", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds a case.")
    @click.option("--stop-after", type=click.FloatRange(0), help="Start no further case after so many seconds.")
    @click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
    def command(device: str, threads: int, budget: float, stop_after: float | None, output: Path | None) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        where = environment(torch.device(device))
        if compiled and not has_kernel(op, device):
            raise click.ClickException(f"there is no compiled kernel of {op} for {device}")
        records = []
        start = time.perf_counter()
        for case in cases(device):
            if stop_after is not None and time.perf_counter() - start > stop_after:
                click.echo(f"stopped after {stop_after:g} s: {shape_text(records[-1])} was the last case", err=True)
                break
            measured = measure(case, budget)
            records += measured
            if output:
                append(output, measured, where)  # at once: what is measured stays, whatever comes
        Console(width=160).print(_table(f"{op} on {where['device']}, {threads} threads", records))

    command()
