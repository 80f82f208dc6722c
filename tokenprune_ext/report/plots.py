"""Plots of a comparison as SVG: quality against MACs and against speed-up, one line per method."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune_ext.compare import Row

# Okabe and Ito's palette, told apart with any colour vision; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one more than colours, so that no pair comes back soon
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#1f2933",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "font.size": 10,
    "svg.hashsalt": "tokenprune",
}


def plot_macs(rows: Sequence[Row]) -> str:
    """Quality against the share of the dense blocks' MACs, scoring charged, as a data: URI of an SVG."""
    label = "MACs of the blocks and of scoring, % of dense"
    return _plot(rows, lambda row: 100 * row.macs.charged_fraction, label, invert=True)


def plot_speedup(rows: Sequence[Row]) -> str | None:
    """Quality against measured speed-up, as a data: URI of an SVG; None when no latency was measured."""
    if any(row.latency is None for row in rows):
        return None

    def speedup(row: Row) -> float:
        assert row.latency is not None
        return row.latency.speedup

    return _plot(rows, speedup, "measured speed-up over dense", invert=False)


def _quality(rows: Sequence[Row]) -> tuple[str, Callable[[Row], tuple[float, float]]]:
    """Axis label, and (value, standard error) of a row in %: top-1 where there are labels, else agreement."""
    if rows[0].accuracy.top1 is not None:
        return "top-1, %", lambda row: (100 * (row.accuracy.top1 or 0.0), 100 * (row.accuracy.top1_change_se or 0.0))
    return "agreement with dense, %", lambda row: (100 * row.accuracy.agreement, 0.0)


def _plot(rows: Sequence[Row], x: Callable[[Row], float], x_label: str, *, invert: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    label, quality = _quality(rows)
    dense = rows[0]
    methods = list(dict.fromkeys(row.method for row in rows[1:]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes: Any = figure.subplots()
        axes.axhline(quality(dense)[0], color="#6b7280", linewidth=1, linestyle=(0, (4, 3)))
        for number, method in enumerate(methods):
            own = sorted((row for row in rows if row.method == method), key=lambda row: row.macs.blocks)
            xs, ys, errors = zip(*((x(row), *quality(row)) for row in own), strict=True)
            axes.errorbar(
                xs,
                ys,
                yerr=errors if any(errors) else None,
                label=method,
                color=COLOURS[number % len(COLOURS)],
                marker=_MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)],  # no pair comes twice
                markersize=6,
                linewidth=1.6,
                capsize=2.5,
                elinewidth=1,
            )
        axes.plot(x(dense), quality(dense)[0], marker="*", markersize=13, color="#111827", linestyle="", label="dense")
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        if invert:  # cheaper to the right, as in the plot of the speed-up
            axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=9)
        return _svg_uri(figure)


def _svg_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
