"""Figures of a profile: staircase, accuracy, utility, blocks. Sizes and text are those of a printed column."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenprune_ext.report.plots import COLOURS, STYLE

from .blocks import BlockTable
from .result import BatchProfile, Profile
from .utility import utilities

Prediction = Sequence[tuple[int, float]]  # (patch tokens, seconds)

_BLUE, _RED, _GREEN, _PINK = COLOURS[:4]
_INK = "#111827"
_DPI = 220
_FEW = 8  # steps up to which each is labelled
_TOKENS = "patch tokens kept"


def staircase(profile: Profile, one: BatchProfile, predicted: Prediction = ()) -> bytes:
    """Latency over tokens with its steps, the workload on a second axis, and a prediction, if there is one; PNG."""

    def draw(figure: Figure) -> None:
        axes: Any = figure.subplots()
        series, settings = one.series, profile.settings
        axes.fill_between(
            series.tokens,
            [1e3 * t for t in series.q20_s],
            [1e3 * t for t in series.q80_s],
            color=_BLUE,
            alpha=0.15,
            linewidth=0,
            label="20-80 % of the calls",
        )
        if predicted:
            tokens, seconds = zip(*sorted(predicted), strict=True)
            axes.step(tokens, [1e3 * t for t in seconds], where="mid", color=_RED, linewidth=1.3, label="predicted")
        axes.plot(
            series.tokens, [1e3 * t for t in series.median_s], ".", color=_BLUE, markersize=4, label="measured, median"
        )
        for number, step in enumerate(one.steps):
            place = (step.below + step.above) / 2
            axes.axvline(place, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), label=None if number else "step")
            if len(one.steps) <= _FEW:
                text = f"{100 * step.relative:+.1f} %"
                at = {"xy": (place, 0.98), "xycoords": ("data", "axes fraction"), "va": "top", "rotation": 90}
                axes.annotate(text, **at, xytext=(2, 0), textcoords="offset points", fontsize=7.5, color=_INK)
        _mark_choice(axes, one, lambda tokens: 1e3 * series.latency[tokens])
        axes.set_xlabel(_TOKENS)
        axes.set_ylabel("latency, ms")
        axes.set_ylim(0, 1.2e3 * max(*series.q80_s, *series.median_s))  # the labels of steps have room at the top
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        prefix = settings.num_prefix_tokens
        scale = one.batch_size * settings.channels / 1e3
        top = axes.secondary_xaxis(
            "top", functions=(lambda n: scale * (prefix + n), lambda workload: workload / scale - prefix)
        )
        top.set_xlabel("workload size B × N × C, thousands")
        axes.legend(fontsize=8.5, loc="upper left", framealpha=0.9, edgecolor="none")  # over the lines of steps

    return _png(draw)


def accuracy(profile: Profile, one: BatchProfile) -> bytes:
    """The accuracy proxy over tokens, with its standard error; PNG."""

    def draw(figure: Figure) -> None:
        axes: Any = figure.subplots()
        tokens = list(profile.accuracy)
        values = [100 * entry["value"] for entry in profile.accuracy.values()]
        errors = [100 * entry["se"] for entry in profile.accuracy.values()]
        band = [[v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1)]
        axes.fill_between(tokens, *band, color=_GREEN, alpha=0.18, linewidth=0, label="± standard error")
        axes.plot(tokens, values, ".-", color=_GREEN, markersize=5, linewidth=1.2, label="random removal")
        at = profile.accuracy_at(one.series.tokens)
        _mark_choice(axes, one, lambda count: 100 * at[count])
        axes.set_xlabel(_TOKENS)
        axes.set_ylabel(f"{next(iter(profile.accuracy.values()))['measure']}, %")
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")

    return _png(draw)


def utility(profile: Profile, one: BatchProfile) -> bytes:
    """U_L, U_A and U over tokens with the choice, and R over alpha; PNG."""

    def draw(figure: Figure) -> None:
        assert one.choice is not None
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        tokens = one.series.tokens
        rows = utilities(one.series.latency, profile.accuracy_at(tokens), one.choice.alpha).values()
        for place, (name, colour, width) in enumerate(
            (("$U_L$, latency", _BLUE, 1.1), ("$U_A$, accuracy", _GREEN, 1.1), ("$U$", _INK, 1.6))
        ):
            left.plot(tokens, [row[place] for row in rows], color=colour, linewidth=width, label=name)
        _mark_choice(left, one, lambda count: next(u[2] for n, u in zip(tokens, rows, strict=True) if n == count))
        left.set_xlabel(_TOKENS)
        left.set_ylabel(f"utility at α = {one.choice.alpha:g}")
        left.set_ylim(0, 1.05)
        left.legend(
            frameon=False, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.2
        )
        alphas, removed = zip(*((choice.alpha, choice.removed) for choice in one.sweep), strict=True)
        right.step(alphas, removed, where="mid", color=_PINK, linewidth=1.4)
        right.plot(alphas, removed, "o", color=_PINK, markersize=4)
        right.set_xlabel("α, weight of latency")
        right.set_ylabel("tokens removed, R")
        right.set_ylim(bottom=-0.02 * profile.settings.num_patches)

    return _png(draw, size=(7.6, 3.4))


def blocks(profile: Profile, one: BatchProfile, table: BlockTable) -> bytes:
    """Latency of a block over tokens, and of every block of the dense and of the chosen model; PNG."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        for (kind, row), colour in zip(table.seconds.items(), COLOURS, strict=False):
            own = [str(i) for i, k in enumerate(table.kinds) if k == kind]
            name = f"block {own[0]}" if len(own) == 1 else f"blocks {own[0]}-{own[-1]}"
            left.plot(table.tokens, [1e3 * t for t in row], ".-", color=colour, markersize=3, lw=0.8, label=name)
        left.set_xlabel("patch tokens that enter")
        left.set_ylabel("latency of one block, ms")
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize=8.5, loc="upper left")
        bars = {"dense": table.estimate({})}
        if one.choice is not None and one.choice.removed:
            bars[f"{one.choice.tokens} tokens kept"] = table.estimate({profile.settings.layer: one.choice.tokens})
        width = 0.8 / len(bars)
        for number, ((name, seconds), colour) in enumerate(zip(bars.items(), (_INK, _RED), strict=False)):
            places = [i + (number - (len(bars) - 1) / 2) * width for i in range(len(seconds))]
            right.bar(places, [1e3 * t for t in seconds], width, color=colour, label=name, zorder=2)
        right.set_xlabel("block")
        right.set_ylabel("latency, ms")
        right.set_ylim(top=1.25e3 * max(max(seconds) for seconds in bars.values()))  # room for the legend
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.legend(frameon=False, fontsize=8.5, loc="upper right", ncols=2)

    return _png(draw, size=(7.6, 3.2))


def _mark_choice(axes: Any, one: BatchProfile, height: Callable[[int], float]) -> None:
    dense = one.series.tokens[-1]
    axes.plot(dense, height(dense), marker="*", markersize=12, color=_INK, linestyle="", label="dense")
    if one.choice is not None and one.choice.removed:
        n = one.choice.tokens
        axes.plot(
            n,
            height(n),
            marker="o",
            markersize=8,
            markerfacecolor="none",
            markeredgewidth=1.8,
            color=_RED,
            linestyle="",
            label=f"chosen: {n} kept, R = {one.choice.removed}",
        )


def _png(draw: Callable[[Figure], None], size: tuple[float, float] = (6.2, 4.0)) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
