"""Pictures of what pruning does to the patches of a few images: PNG figures, and a page that shows them all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress
from torch import nn

from tokenprune_ext.compare import share
from tokenprune_ext.data import ImageSource, batches
from tokenprune_ext.methods import Method
from tokenprune_ext.prune import apply, describe, schedule_of
from tokenprune_ext.report import render
from tokenprune_ext.report.figures import layers_figure, methods_figure, panels, scores_figure
from tokenprune_ext.report.pictures import Picture, take_pictures
from tokenprune_ext.schedule import Schedule

_BATCH = 16


@dataclass(frozen=True)
class Figures:
    """The files of one image; names are relative to the folder.

    Attributes:
        picture: what was drawn.
        methods: all variants side by side.
        scores: the scores of those that rank tokens; None when none does.
        layers: by variant, its own layers.
    """

    picture: Picture
    methods: str
    scores: str | None
    layers: dict[str, str]


def prune_variants(
    model: nn.Module, methods: Mapping[str, Method], schedules: Mapping[str, Schedule], **how: Any
) -> tuple[dict[str, nn.Module], list[str]]:
    """Pruned copies of a model that share its weights, by label, and a note for every method that cannot prune it.

    Args:
        model: a supported model.
        methods: methods by label.
        schedules: schedules by label.
        how: ``keep``, ``macs`` and ``layers`` for the methods, as :func:`tokenprune_ext.apply` takes them.

    Raises:
        ValueError: a schedule does not fit the model, or nothing is left that prunes.
    """
    variants: dict[str, nn.Module] = {}
    notes = []
    for label, method in methods.items():
        try:
            variants[label] = apply(share(model), method, **how)
        except ValueError as error:  # this method cannot do this model or this budget; others may
            notes.append(f"{label} left out: {error}")
    for label, schedule in schedules.items():
        variants[label] = apply(share(model), schedule)
    pruning = {label: net for label, net in variants.items() if schedule_of(net).pruning()}
    notes += [f"{label} left out: it prunes nothing" for label in variants if label not in pruning]
    if not pruning:
        raise ValueError("nothing to show: " + ("; ".join(notes) or "no method and no schedule given"))
    return pruning, notes


def visualize(
    model: nn.Module,
    variants: Mapping[str, nn.Module],
    images: ImageSource,
    names: Sequence[str],
    transform: Callable[[Any], Any],
    folder: str | Path,
    *,
    data_config: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    columns: int = 4,
    dpi: int = 300,
    single_panels: bool = False,
    progress: Progress | None = None,
) -> list[Figures]:
    """Draw what every variant does to every image.

    Args:
        model: the dense model.
        variants: pruned copies of it by label, see :func:`prune_variants`.
        images: what to draw on.
        names: one a image; files are named after them.
        transform, data_config: preprocessing of one PIL image, and its configuration (see `data.preprocessing`).
        folder: where to write, made if needed; files of the same names are replaced.
        class_names: names of the classes in order, or None.
        columns: pruning layers that a figure shows at most, evenly spaced.
        dpi: pixels an inch; a panel is 1.12 inches wide.
        single_panels: write every panel as a file of its own, too, into ``panels``.
        progress: where to show a progress bar.

    Raises:
        DataError: an image that cannot be read.
        OSError: a file that cannot be written.
    """
    folder = Path(folder)
    (folder / "panels" if single_panels else folder).mkdir(parents=True, exist_ok=True)
    progress = progress or Progress(disable=True)
    task = progress.add_task("drawing", total=len(images))
    device, dtype = (next(model.parameters()).device, next(model.parameters()).dtype)
    stems = _unique([_slug(Path(name).stem) for name in names])
    slugs = dict(zip(variants, _unique([_slug(label) for label in variants]), strict=True))
    found: list[Figures] = []
    for pixels, labels in batches(images, transform, _BATCH):
        done = len(found)
        pictures = take_pictures(
            model,
            variants,
            pixels.to(device, dtype),
            labels=labels.tolist(),
            names=names[done : done + len(labels)],
            class_names=class_names,
            mean=data_config["mean"],
            std=data_config["std"],
        )
        for picture in pictures:
            stem = stems[len(found)]
            found.append(_draw(picture, folder, stem, slugs, columns, dpi))
            if single_panels:
                _draw_panels(picture, folder / "panels", stem, slugs, dpi)
            progress.advance(task)
    return found


def write_page(
    folder: str | Path,
    figures: Sequence[Figures],
    model: nn.Module,
    variants: Mapping[str, nn.Module],
    command: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write index.html, which shows the figures beside it. Returns its path."""
    path = Path(folder) / "index.html"
    reports = {label: describe(net) for label, net in variants.items()}
    page = render(
        "visualize.html.j2", model=describe(model).model, figures=figures, reports=reports, command=command, notes=notes
    )
    path.write_text(page, "utf-8")
    return path


def _draw(picture: Picture, folder: Path, stem: str, slugs: Mapping[str, str], columns: int, dpi: int) -> Figures:
    methods, scores = f"{stem}-methods.png", f"{stem}-scores.png"
    layers = {label: f"{stem}-{slug}.png" for label, slug in slugs.items()}
    methods_figure(folder / methods, picture, columns, dpi)
    scored = scores_figure(folder / scores, picture, columns, dpi)
    for own in picture.progressions:
        layers_figure(folder / layers[own.variant], picture, own, columns, dpi)
    return Figures(picture, methods, scores if scored else None, layers)


def _draw_panels(picture: Picture, folder: Path, stem: str, slugs: Mapping[str, str], dpi: int) -> None:
    for own in picture.progressions:
        for stage in own.stages:
            for kind, pixels in panels(picture, stage, dpi).items():
                name = f"{stem}-{slugs[own.variant]}-block{stage.block}-{kind}.png"
                Image.fromarray(pixels).save(folder / name, dpi=(dpi, dpi))


def _slug(text: str) -> str:
    """The text as a file name."""
    return re.sub(r"[^A-Za-z0-9_.=]+", "-", text).strip("-.") or "image"


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again."""
    found: list[str] = []
    for name in names:
        number = itertools.count(2)
        unique = name
        while unique in found:
            unique = f"{name}-{next(number)}"
        found.append(unique)
    return found
