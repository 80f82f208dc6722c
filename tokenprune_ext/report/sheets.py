"""Sheets: panels of one image in rows and columns, labelled, to the pixel, at the size of a printed figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .panels import PALE, Pixels, colours

_INK, _SOFT = "#1f2933", "#5b6775"
_FONT: Any = {"font.family": "sans-serif", "font.sans-serif": ["Arial", "Liberation Sans", "DejaVu Sans"]}
_TEXT, _LINE, _GAP, _MARGIN = 7.0, 9.0, 5.0, 4.0  # points

# What the key may explain, by name.
KEY = {
    "dropped": "dropped",
    "gone": "not kept",
    "merged": "merged, in their mean colour",
    "score": "lowest to highest score",
}


@dataclass(frozen=True)
class Row:
    """Panels of one size side by side, with a label in front; None leaves a place free. One caption below each."""

    label: str
    panels: Sequence[Pixels | None]
    captions: Sequence[str] = ()


def draw_sheet(
    path: Path, dpi: int, image: Pixels, headers: Sequence[str], rows: Sequence[Row], key: Sequence[str]
) -> None:
    """Write a PNG: the image on the left, the rows beside it, the key below.

    Args:
        path: file to write.
        dpi: pixels an inch; sizes of text and gaps follow it.
        image: the image at the size of a panel.
        headers: one above each column, of one or two lines; may be empty.
        rows: at least one.
        key: names of :data:`KEY`, in the order to be explained.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def px(points: float) -> int:
        return round(points * dpi / 72)

    height, width = image.shape[:2]
    gap, margin, line = px(_GAP), px(_MARGIN), px(_LINE)
    labels = [row.label.replace(":", "\n") for row in rows]
    label_width = line * max(label.count("\n") + 1 for label in labels)
    top = margin + line * max([1, *(header.count("\n") + 1 for header in headers)])
    steps = [height + (line + gap // 2 if row.captions else gap) for row in rows]
    body = sum(steps) - (gap // 2 if rows[-1].captions else gap)
    left = margin + width + 2 * gap + label_width
    columns = max(len(row.panels) for row in rows)
    size = (left + columns * (width + gap) - gap + margin, top + body + (gap + line if key else 0) + margin)

    figure = Figure(figsize=((size[0] + 0.01) / dpi, (size[1] + 0.01) / dpi), dpi=dpi, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)

    def put(pixels: Pixels, x: int, y: int) -> None:
        figure.figimage(pixels, x, size[1] - y - pixels.shape[0], origin="upper")

    def write(text: str, x: float, y: float, **how: Any) -> int:
        """Puts text around a place, and returns its width."""
        style = {"fontsize": _TEXT, "color": _INK, "ha": "center", "va": "center", "linespacing": 1.15}
        written = figure.text(x / size[0], 1 - y / size[1], text, **{**style, **how})
        return round(written.get_window_extent(canvas.get_renderer()).width)

    with matplotlib.rc_context(_FONT):
        start = top + (body - (line if rows[-1].captions else 0) - height) // 2
        put(image, margin, start)
        write("input", margin + width / 2, start - line / 2)
        for column, header in enumerate(headers):
            write(header, left + column * (width + gap) + width / 2, top - line * (header.count("\n") + 1) / 2)
        y = top
        for row, label, step in zip(rows, labels, steps, strict=True):
            write(label, left - gap - label_width / 2, y + height / 2, rotation=90)
            for column, panel in enumerate(row.panels):
                x = left + column * (width + gap)
                if panel is not None:
                    put(panel, x, y)
                if row.captions:
                    write(row.captions[column], x + width / 2, y + height + line / 2, fontsize=_TEXT - 1, color=_SOFT)
            y += step
        x, middle, side = left, top + body + gap + line // 2, px(6)
        for name in key:
            swatch = _swatch(name, side)
            put(swatch, x, middle - side // 2)
            x += swatch.shape[1] + px(3)
            x += write(KEY[name], x, middle, ha="left", fontsize=_TEXT - 1, color=_SOFT) + px(12)
        canvas.print_png(path, metadata={"Software": None})


def _swatch(name: str, side: int) -> Pixels:
    """What the key shows beside a name."""
    if name == "score":
        ramp = 255 * colours(np.linspace(0, 1, 5 * side))
        return np.broadcast_to(ramp.round(), (side, 5 * side, 3)).astype(np.uint8)
    edge = np.full((side, side, 3), 168, np.uint8)
    edge[1:-1, 1:-1] = round(PALE)
    if name == "merged":
        edge[1:-1, 1:-1] = (150, 120, 90)
        edge[:, side // 2] = 255
    return edge
