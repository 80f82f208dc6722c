"""The figures of one image: all methods side by side, their scores, and every method on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from .panels import Pixels, cell_size, draw_kept, draw_scores, draw_tokens, enlarge
from .pictures import Picture, Progression, Stage
from .sheets import Row, draw_sheet

_SIDE = 1.12  # inches along a panel: four and the input fill the width of a page
Item = TypeVar("Item")


def methods_figure(path: Path, picture: Picture, columns: int, dpi: int) -> None:
    """The tokens that are left of every method, behind the same blocks."""
    shown = picture.progressions
    blocks = spread(sorted({stage.block for own in shown for stage in own.stages}), columns)
    image, cell = _input(picture, dpi)
    rows = []
    for own in shown:
        stages = [stage_behind(own, block) for block in blocks]
        panels = [draw_tokens(picture.pixels, stage.source, cell) for stage in stages]
        rows.append(Row(own.variant, panels, [f"{stage.tokens} tokens" for stage in stages]))
    draw_sheet(path, dpi, image, [f"block {block}" for block in blocks], rows, _key(shown, "dropped"))


def scores_figure(path: Path, picture: Picture, columns: int, dpi: int) -> bool:
    """The scores of every method that ranks tokens, at its own layers; False, and no file, when none does."""
    image, cell = _input(picture, dpi)
    rows = []
    for own in picture.progressions:
        scored = spread([(stage.block, stage.scores) for stage in own.stages if stage.scores is not None], columns)
        panels, captions = (
            [draw_scores(scores, cell) for _, scores in scored],
            [f"block {block}" for block, _ in scored],
        )
        if panels:
            rows.append(Row(own.variant, panels, captions))
    if rows:
        draw_sheet(path, dpi, image, (), rows, ("score",))
    return bool(rows)


def layers_figure(path: Path, picture: Picture, own: Progression, columns: int, dpi: int) -> None:
    """One method at its own layers: the patches it keeps, those it merges, and its scores, where there are any."""
    stages = spread(own.stages, columns)
    image, _ = _input(picture, dpi)
    headers = [f"block {stage.block}\n{stage.tokens} tokens" for stage in stages]
    drawn = [panels(picture, stage, dpi) for stage in stages]
    rows = [
        Row(name, [of.get(name) for of in drawn])
        for name in ("kept", "merged", "score")
        if any(name in of for of in drawn)
    ]
    key = [*_key([own], "gone"), *(["score"] if any("score" in of for of in drawn) else [])]
    draw_sheet(path, dpi, image, headers, rows, key)


def panels(picture: Picture, stage: Stage, dpi: int) -> dict[str, Pixels]:
    """Everything there is to draw of one layer, by name."""
    _, cell = _input(picture, dpi)
    found = {"kept": draw_kept(picture.pixels, stage.kept, cell)}
    if stage.counts["merged"]:
        found["merged"] = draw_tokens(picture.pixels, stage.source, cell)
    if stage.scores is not None:
        found["score"] = draw_scores(stage.scores, cell)
    return found


def stage_behind(own: Progression, block: int) -> Stage:
    """What is left behind a block: the latest pruning layer's stage, or all patches in front of the first."""
    shape = own.stages[0].source.shape
    untouched = Stage(-1, np.arange(own.stages[0].source.size).reshape(shape), np.ones(shape, dtype=bool))
    return [stage for stage in (untouched, *own.stages) if stage.block <= block][-1]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced, the last among them."""
    count = min(most, len(items))
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def _input(picture: Picture, dpi: int) -> tuple[Pixels, int]:
    """The image at the size of a panel, and the pixels of one of its patches."""
    grid = picture.progressions[0].stages[0].source.shape
    cell = cell_size(grid, round(_SIDE * dpi))
    return enlarge(picture.pixels, grid, cell), cell


def _key(shown: Sequence[Progression], pale: str) -> list[str]:
    """What has to be explained, with the name for what is pale."""
    last = [own.stages[-1] for own in shown]
    gone = any((stage.source < 0).any() if pale == "dropped" else not stage.kept.all() for stage in last)
    merged = any(stage.counts["merged"] for stage in last)
    return [name for name, there in ((pale, gone), ("merged", merged)) if there]
