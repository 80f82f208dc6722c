"""Plot of a schedule search: divergence against cost, what was found beside what a person would try."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .plots import COLOURS, STYLE

if TYPE_CHECKING:
    from tokenprune_ext.search import SearchResult


def front_figure(path: Path, result: SearchResult, cost_label: str) -> None:
    """Write the Pareto front on the search images, and the schedules judged on the others, as a picture."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [100 * trial.cost for trial in result.front],
            [trial.kl for trial in result.front],
            drawstyle="steps-post",
            color=COLOURS[0],
            linewidth=1.2,
            label="Pareto front, search images",
        )
        for variants, name, colour, marker in (
            (result.best, "searched", COLOURS[1], "o"),
            (result.uniform, "uniform", COLOURS[2], "s"),
        ):
            judged = [variant for variant in variants if variant.held_out is not None]
            if judged:
                axes.errorbar(
                    [100 * variant.cost for variant in judged],
                    [variant.held_out.kl for variant in judged if variant.held_out],
                    [variant.held_out.kl_se or 0.0 for variant in judged if variant.held_out],
                    fmt=marker,
                    color=colour,
                    capsize=3,
                    label=f"{name}, held-out images",
                )
        if any(trial.kl > 0 for trial in result.front):
            axes.set_yscale("log")
        axes.set_xlabel(cost_label)
        axes.set_ylabel("mean KL(dense || pruned), nats")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
