"""One table and one plot of all records in a results folder, e.g. bench/results/amd-epyc-2-threads."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click
from harness import KERNEL, shape_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

REFERENCE = "reference"
COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00"}  # Okabe and Ito's, told apart with any colour vision
COLUMNS = 3

Record = dict[str, Any]
Case = dict[str, Record]  # the records of one case by variant


def read(folder: Path) -> list[Case]:
    """The cases in the folder's JSON-lines files; of a case that was measured again, the last measurement."""
    cases: dict[tuple[str, ...], Case] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if "op" not in record:  # whole models have a table of their own
                continue
            key = (record["op"], shape_text(record), record["dtype"])
            if record["variant"] == KERNEL:  # comes first: what follows was measured with it
                cases[key] = {}
            cases[key][record["variant"]] = record
    return list(cases.values())


def _over_kernel(case: Case, variant: str) -> str:
    return f"{case[variant]['ratio']:.2f} x" if variant in case else ""


def table(cases: list[Case]) -> Table:
    columns = ("kernel ms", "reference / kernel", "others / kernel", "time/floor")
    result = Table("op", "case", "dtype", *columns)
    for case in cases:
        kernel = case[KERNEL]
        others = [f"{name} {_over_kernel(case, name)}" for name in case if name not in (KERNEL, REFERENCE)]
        result.add_row(
            kernel["op"],
            shape_text(kernel),
            kernel["dtype"],
            f"{kernel['median_s'] * 1e3:.3f}",
            _over_kernel(case, REFERENCE),
            ", ".join(others),
            f"{kernel['time_over_floor']:.2f}" if "time_over_floor" in kernel else "",
        )
    return result


def plot(cases: list[Case], title: str) -> Figure:
    """A panel an operator: a dot a case, its speed-up over the reference against N; lines through the medians."""
    compared = [case for case in cases if REFERENCE in case]
    ops = sorted({case[KERNEL]["op"] for case in compared})
    rows = -(-len(ops) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    tokens = sorted({case[KERNEL]["N"] for case in compared})
    for axes, op in zip(grid, ops, strict=False):
        _panel(axes, [case for case in compared if case[KERNEL]["op"] == op], tokens)
        axes.set_title(op, fontsize=10)
    for axes in grid[len(ops) :]:
        axes.set_visible(False)
    markers = [Line2D([], [], color=colour, marker="o", label=dtype) for dtype, colour in COLOURS.items()]
    figure.legend(handles=markers, loc="outside upper right", frameon=False, ncols=len(markers))
    figure.suptitle(f"{title}: one dot a case, lines through the medians", x=0.01, ha="left", fontsize=11)
    figure.supxlabel("tokens N", fontsize=10)
    figure.supylabel("speed-up over the plain-torch reference", fontsize=10)
    return figure


def _panel(axes: Axes, cases: list[Case], tokens: list[int]) -> None:
    for offset, (dtype, colour) in zip((-0.1, 0.1), COLOURS.items(), strict=True):
        found: dict[int, list[float]] = {}
        for case in cases:
            if case[KERNEL]["dtype"] == dtype:
                found.setdefault(tokens.index(case[KERNEL]["N"]), []).append(case[REFERENCE]["ratio"])
        for place, ratios in found.items():
            axes.plot([place + offset] * len(ratios), ratios, "o", color=colour, markersize=3.5, alpha=0.45, mew=0)
        places = sorted(found)
        axes.plot([p + offset for p in places], [statistics.median(found[p]) for p in places], color=colour, lw=1.5)
    axes.axhline(1, color="#6b7280", lw=1, ls=(0, (4, 3)))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axes.set_xticks(range(len(tokens)), [str(n) for n in tokens])
    axes.tick_params(labelbottom=True)
    axes.grid(axis="y", color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--plot", "output", type=click.Path(path_type=Path), help="[default: summary.png in the folder]")
def main(folder: Path, output: Path | None) -> None:
    cases = read(folder)
    if not cases:
        raise click.ClickException(f"no records in the *.jsonl files of {folder}")
    Console(width=170).print(table(cases))
    output = output or folder / "summary.png"
    plot(cases, cases[-1][KERNEL]["environment"]["device"]).savefig(output, dpi=150)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
