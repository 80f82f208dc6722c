"""Panels: an image and what happened to its patches, drawn to the pixel, so that every border is crisp."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Array = npt.NDArray[Any]
PALE = 243.0  # where no token stands for a patch, and the white that dropped patches fade to
_FADE = 0.14
_BRIGHT = 205.0  # where white lines would not be seen
_GREY, _WHITE = 168.0, 255.0


def cell_size(grid: tuple[int, int], side: int) -> int:
    """Pixels of a patch, for a panel of about ``side`` pixels along its longer side."""
    return max(2, round(side / max(grid)))


def enlarge(pixels: Pixels, grid: tuple[int, int], cell: int) -> Pixels:
    """The image at ``cell`` pixels a patch."""
    size = (grid[1] * cell, grid[0] * cell)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def draw_kept(pixels: Pixels, kept: Array, cell: int) -> Pixels:
    """The image with every patch pale whose own token is gone; ``kept`` [rows, columns]."""
    out = enlarge(pixels, kept.shape, cell).astype(float)
    _fade(out, ~kept, cell)
    return _finished(out)


def draw_tokens(pixels: Pixels, source: Array, cell: int) -> Pixels:
    """The tokens that are left: patches that share one in their mean colour, inside a line, as in ToMe's figures.

    Args:
        pixels: the image.
        source: the token that stands for each patch, [rows, columns]; -1 for none: pale.
        cell: pixels of a patch.
    """
    out = enlarge(pixels, source.shape, cell).astype(float)
    token, count = np.unique(source[source >= 0], return_counts=True)
    merged = np.isin(source, token[count > 1])
    for member in token[count > 1]:
        place = _enlarged(source == member, cell)
        out[place] = out[place].mean(0)
    _fade(out, source < 0, cell)
    for axis in (0, 1):
        _draw_lines(out, _between(source, axis) & _either(merged, axis), axis, max(1, cell // 11), _WHITE)
    return _finished(out)


def draw_scores(scores: Array, cell: int) -> Pixels:
    """Scores [rows, columns] by their rank, from the lowest (dark) to the highest (light); NaN is pale."""
    ranked = np.isfinite(scores)
    values, rank = np.unique(scores[ranked], return_inverse=True)  # patches that share a token share its rank
    out = np.full((*scores.shape, 3), PALE)
    out[ranked] = 255 * colours(rank / max(1, len(values) - 1))
    return _finished(_enlarged(out, cell))


def colours(values: Array) -> Array:
    """Colours [..., 3] in [0, 1] of values in [0, 1]: viridis, in the same order for any colour vision and in grey."""
    import matplotlib

    return np.asarray(matplotlib.colormaps["viridis"](values))[..., :3]


def _fade(out: Array, gone: Array, cell: int) -> None:
    place = _enlarged(gone, cell)
    out[place] = _FADE * out[place].mean(-1, keepdims=True) + (1 - _FADE) * PALE
    for axis in (0, 1):  # a thin line tells a bright patch from one that is gone
        _draw_lines(out, _between(gone, axis), axis, max(1, cell // 22), _GREY)


def _between(cells: Array, axis: int) -> Array:
    """Where neighbours along an axis differ; one shorter along it."""
    before, after = _neighbours(cells, axis)
    return np.asarray(before != after)


def _either(cells: Array, axis: int) -> Array:
    before, after = _neighbours(cells, axis)
    return np.asarray(before | after)


def _neighbours(cells: Array, axis: int) -> tuple[Array, Array]:
    return (cells[:-1], cells[1:]) if axis == 0 else (cells[:, :-1], cells[:, 1:])


def _draw_lines(out: Array, where: Array, axis: int, width: int, colour: float) -> None:
    """Lines behind the cells in ``where`` along an axis, long enough to close the corners; grey where it is bright."""
    cell = out.shape[axis] // (where.shape[axis] + 1)
    for place in np.argwhere(where):
        span = []
        for i, index in enumerate(place):
            start = (index + 1) * cell if i == axis else index * cell
            stop = start if i == axis else start + cell
            span.append(slice(max(0, start - width // 2), stop + width - width // 2))
        line = out[tuple(span)]
        line[:] = _GREY if line.mean() > _BRIGHT else colour


def _enlarged(cells: Array, cell: int) -> Array:
    return cells.repeat(cell, 0).repeat(cell, 1)


def _finished(out: Array) -> Pixels:
    return out.round().clip(0, 255).astype(np.uint8)
