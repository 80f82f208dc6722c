"""Every operator's CPU kernel against its plain-torch reference and its target, at 197 and 577 tokens.

The cases are those of bench_<op>.py. A kernel far above its target may still be slow, and one below it as fast as
memory allows: beside the ratio stands the time over the floor and, where the input is much and the work little, over
the time in which torch.sum reads that input. A second table has every operator by its number of tokens: the geometric
mean of the ratios of its cases, and the smallest.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from floors import rates
from harness import KERNEL, READ, Case, append, measure, shape_text
from rich.console import Console
from rich.table import Table
from summary import REFERENCE

from tokenprune_ext import ops
from tokenprune_ext.environment import environment
from tokenprune_ext.info import has_kernel

TOKENS = (197, 577)
BATCHES = (1, 8)
TARGET = 1.5
# Their references are matrix products of torch's, which the kernels form again without storing the result.
TARGETS = dict.fromkeys(("attn_colsum_qk", "wpr_qk", "zero_tprune", "nearest_token", "bipartite_match"), 1.2)


def cases(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """Those of the operator's benchmark that have a target."""
    for case in importlib.import_module(f"bench_{op}").cases("cpu"):
        if case.dtype == dtype and case.shape["N"] in TOKENS and case.shape["B"] in BATCHES:
            yield case


def row(records: list[dict[str, Any]], threads: int) -> tuple[str, ...]:
    """Of one case: what was measured, its ratio, the target, and whether it holds."""
    of = {record["variant"]: record for record in records}
    kernel, ratio = of[KERNEL], of[REFERENCE]["ratio"]
    target = TARGETS.get(kernel["op"], TARGET)
    over_reading = f"{1 / of[READ]['ratio']:.2f}" if READ in of else ""
    times = (f"{kernel['median_s'] * 1e3:.3f}", f"{kernel['time_over_floor']:.1f}", over_reading)
    return (
        kernel["op"],
        shape_text(kernel),
        str(threads),
        *times,
        f"{ratio:.2f} x",
        f"{target:g} x",
        "yes" if ratio >= target else "NO",
    )


def by_operator(records: Iterable[dict[str, Any]], threads: int) -> Iterator[tuple[str, ...]]:
    """A row an operator and number of tokens, with any batch, heads and options."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if record["variant"] == REFERENCE:
            ratios.setdefault((record["op"], record["N"]), []).append(record["ratio"])
    for (op, tokens), found in ratios.items():
        mean, target = statistics.geometric_mean(found), TARGETS.get(op, TARGET)
        values = (f"{mean:.2f} x", f"{min(found):.2f} x", f"{target:g} x", "yes" if mean >= target else "NO")
        yield op, str(tokens), str(threads), str(len(found)), *values


@click.command(help=__doc__)
@click.option("--op", "chosen", type=click.Choice(ops.__all__), multiple=True, help="Only these; repeatable.")
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=0.3, show_default=True, help="Seconds a case.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(chosen: tuple[str, ...], threads: tuple[int, ...], dtype: str, budget: float, output: Path | None) -> None:
    table = Table(
        "op", "case", "threads", "kernel ms", "time/floor", "time/torch.sum", "reference / kernel", "target", "holds"
    )
    operators = Table("op", "N", "threads", "cases", "geometric mean", "smallest", "target", "holds")
    for count in threads:
        torch.set_num_threads(count)
        rates.cache_clear()  # the floors of this number of threads
        where = environment(torch.device("cpu"))
        for op in chosen or ops.__all__:
            if not has_kernel(op, "cpu"):
                raise click.ClickException(f"there is no compiled kernel of {op} for cpu")
            torch.manual_seed(0)
            records: list[dict[str, Any]] = []
            for case in cases(op, getattr(torch, dtype)):
                measured = measure(case, budget)
                table.add_row(*row(measured, count))
                if output:
                    append(output, measured, where)
                records += measured
            for line in by_operator(records, count):
                operators.add_row(*line)
    table.title = operators.title = f"{dtype} on {where['device']}"
    for shown, what in ((table, "cases"), (operators, "operators by number of tokens and threads")):
        Console(width=140).print(shown)
        held = list(shown.columns[-1].cells)
        click.echo(f"{held.count('yes')} of {len(held)} {what} hold")


if __name__ == "__main__":
    main()
