"""The comparison as a table: one list of columns for the terminal and for the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tokenprune_ext.compare import Row

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Column:
    """One figure of a row: heading, what it means, and its text."""

    heading: str
    meaning: str
    text: Callable[[Any], str]  # of a Row, or of what has the same attributes as far as it is shown


def _change(row: Row) -> str:
    accuracy = row.accuracy
    if accuracy.top1_change is None or row.method is None:
        return NOT_MEASURED
    error = accuracy.top1_change_se
    return f"{100 * accuracy.top1_change:+.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _top1(row: Row) -> str:
    return NOT_MEASURED if row.accuracy.top1 is None else f"{100 * row.accuracy.top1:.2f}"


def _latency(row: Row) -> str:
    if row.latency is None:
        return NOT_MEASURED
    times = (row.latency.median_s, row.latency.q20_s, row.latency.q80_s)
    return "{:.1f} ({:.1f}–{:.1f})".format(*(1e3 * value for value in times))


COLUMNS = (
    Column("variant", "method and wanted share of the dense blocks' MACs, scoring charged", lambda row: row.name),
    Column(
        "MACs blocks, G",
        "multiply-accumulates of the blocks per image, and their share of the dense model's; scoring left out",
        lambda row: f"{row.macs.blocks / 1e9:.3f} ({100 * row.macs.blocks_fraction:.1f} %)",
    ),
    Column(
        "with scoring, G",
        "the same and what it takes to choose and merge tokens; a budget limits this",
        lambda row: f"{(row.macs.blocks + row.macs.scoring) / 1e9:.3f} ({100 * row.macs.charged_fraction:.1f} %)",
    ),
    Column(
        "MACs model, G",
        "the blocks with patch embedding and head; scoring left out",
        lambda row: f"{row.macs.model / 1e9:.3f} ({100 * row.macs.model_fraction:.1f} %)",
    ),
    Column("top-1, %", "share of images whose best class is the label", _top1),
    Column("change, points", "top-1 minus dense, ± paired standard error", _change),
    Column(
        "agreement, %",
        "share of images with the dense model's best class",
        lambda row: f"{100 * row.accuracy.agreement:.2f}",
    ),
    Column("KL", "mean KL(dense || pruned) in nats", lambda row: f"{row.accuracy.kl:.4f}"),
    Column("latency, ms", "median time of one batch (20–80 % quantiles)", _latency),
    Column(
        "images/s",
        "batch size over median latency",
        lambda row: NOT_MEASURED if row.latency is None else f"{row.latency.images_per_s:.1f}",
    ),
    Column(
        "speed-up",
        "median latency of dense over this one, same rounds",
        lambda row: NOT_MEASURED if row.latency is None else f"{row.latency.speedup:.2f}x",
    ),
    Column(
        "peak, MB",
        "largest memory one forward holds beyond weights and input, 10^6 bytes",
        lambda row: f"{row.peak_memory / 1e6:.1f}",
    ),
)


def print_table(console: Console, rows: Sequence[Any], title: str, columns: Sequence[Column] = COLUMNS) -> None:
    """Print the rows; on a terminal too narrow for all columns as several tables, each led by the variant."""
    first, *rest = columns
    heading: str | None = title
    while rest:
        count = len(rest)
        while count > 1 and _width(console, _table((first, *rest[:count]), rows, None)) > console.width:
            count -= 1
        console.print(_table((first, *rest[:count]), rows, heading))
        rest, heading = rest[count:], None


def _width(console: Console, table: Table) -> int:
    return table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum


def _table(columns: Sequence[Column], rows: Sequence[Any], title: str | None) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.heading, justify="left" if column is columns[0] else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.method != previous.method:
            table.add_section()
        table.add_row(*(column.text(row) for column in columns))
        previous = row
    return table
