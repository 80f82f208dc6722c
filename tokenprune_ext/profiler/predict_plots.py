"""Predicted staircases as a PNG: a panel a batch size, alone or over a measured one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune_ext.report.plots import COLOURS, STYLE

from .fit import Match, Measured
from .predict import SOURCE, Prediction

_PREDICTED, _MEASURED = COLOURS[0], COLOURS[1]
_INCHES = (6.6, 3.0)  # of a panel


def prediction_figure(path: Path, predictions: Sequence[Prediction], dpi: int = 150) -> None:
    """The staircase of each prediction in milliseconds, with its edges; a panel each, from top to bottom."""
    figure, panels = _panels(len(predictions))
    for panel, prediction in zip(panels, predictions, strict=True):
        _stairs(panel, prediction, 1e3, f"predicted, batch {prediction.batch_size}")
        panel.set_ylabel("latency, ms")
    first = predictions[0]
    _finish(figure, panels, first, f"{first.model}, {first.device}, {first.dtype}\n{SOURCE}", path, dpi)


def overlay_figure(path: Path, prediction: Prediction, measured: Measured, found: Match, dpi: int = 150) -> None:
    """A prediction and a measurement, each as a share of its latency at most tokens, with the edges of both."""
    figure, (panel,) = _panels(1)
    predicted = dict(zip(prediction.tokens, prediction.latency_s, strict=True))
    seconds = {n: s for n, s in zip(measured.tokens, measured.latency_s, strict=True) if n in predicted}
    most = max(seconds)
    _stairs(panel, prediction, 1 / predicted[most], "predicted on paper")
    shares = {count: seconds[count] / seconds[most] for count in seconds}
    panel.plot(*zip(*shares.items(), strict=True), color=_MEASURED, linewidth=1.2, marker=".", markersize=3)
    _mark(panel, found.measured, [shares[count] for count in found.measured], _MEASURED, "s", "measured")
    panel.set_ylabel(f"latency, share of that at {most}")
    case = f"{prediction.model}, {prediction.device}, {prediction.dtype}, batch {prediction.batch_size}"
    _finish(figure, [panel], prediction, f"{case}\n{_score(found)}", path, dpi)


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_INCHES[0], _INCHES[1] * count + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(count, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _stairs(panel: Any, prediction: Prediction, scale: float, label: str) -> None:
    latency = [seconds * scale for seconds in prediction.latency_s]
    panel.plot(prediction.tokens, latency, color=_PREDICTED, linewidth=1.6, drawstyle="steps-pre")
    at = dict(zip(prediction.tokens, latency, strict=True))
    edges = [edge.tokens for edge in prediction.edges]
    _mark(panel, edges, [at[count] for count in edges], _PREDICTED, "o", label)
    # The largest falls get their count; all of them would run into each other.
    for edge in sorted(prediction.edges, key=lambda edge: -edge.fall)[:6]:
        panel.annotate(
            str(edge.tokens), (edge.tokens, at[edge.tokens]), (3, -11), textcoords="offset points", fontsize=8
        )


def _mark(panel: Any, counts: Sequence[int], heights: Sequence[float], colour: str, marker: str, label: str) -> None:
    panel.plot(counts, heights, linestyle="", marker=marker, markersize=5, color=colour, label=f"{label}: edges")


def _finish(figure: Any, panels: list[Any], prediction: Prediction, title: str, path: Path, dpi: int) -> None:
    prefix = f", and {prediction.num_prefix_tokens} in front" if prediction.num_prefix_tokens else ""
    panels[-1].set_xlabel(f"patch tokens that leave block {prediction.layer}{prefix}")
    for panel in panels:  # when everything is drawn: the upper end stays with what is highest
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=9, loc="lower right")
    panels[-1].set_xlim(0, prediction.tokens[-1] * 1.02)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=dpi)


def _score(found: Match) -> str:
    names = ("precision", "recall", "correlation")
    values = [getattr(found, name) for name in names]
    said = [f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in zip(names, values, strict=True)]
    return f"edges within {found.tolerance} tokens: {', '.join(said)}"
