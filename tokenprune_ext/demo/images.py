"""Generated images for the demo model: one shape on a cluttered background.

Image ``i`` of a data set is a pure function of ``(split, seed, i)``: it does not depend on the other
images, on the order of access, or on any global random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

__all__ = [
    "CLASSES",
    "GENERATOR_VERSION",
    "GRID",
    "IMAGE_SIZE",
    "PATCH_SIZE",
    "SPLITS",
    "DemoImages",
]

FloatArray = npt.NDArray[np.float64]
Outline = list[tuple[FloatArray, int]]

#: Changes whenever the same ``(split, seed, i)`` would give a different image.
GENERATOR_VERSION: Final = 1
#: Side of an image in pixels.
IMAGE_SIZE: Final = 112
#: Side of a patch in pixels.
PATCH_SIZE: Final = 8
#: Patches along each side of an image.
GRID: Final = IMAGE_SIZE // PATCH_SIZE
#: Splits draw from separate random streams, so they never share an image even with equal seeds.
SPLITS: Final = {"train": 0, "val": 1}

_OBJECT_PIXELS: Final = (32.0, 48.0)
_SUPERSAMPLE: Final = 3
_CANVAS_SCALE: Final = 2
_MIN_CONTRAST: Final = 90.0
_MASK_COVERAGE: Final = 0.1


def _arc(start: float, stop: float, radius: float, count: int) -> FloatArray:
    """Points ``[count, 2]`` on an arc around the origin, angles in radians."""
    angle = np.linspace(start, stop, count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius


def _regular(corners: int) -> FloatArray:
    return _arc(0.0, 2 * math.pi * (1 - 1 / corners), 1.0, corners)


def _star() -> Outline:
    points = _regular(10)
    points[1::2] *= 0.45
    return [(points, 255)]


def _cross() -> Outline:
    w = 0.3
    half = np.array([(w, 1), (w, w), (1, w), (1, -w), (w, -w), (w, -1)], dtype=np.float64)
    return [(np.concatenate([half, -half]), 255)]


def _heart() -> Outline:
    t = np.linspace(0.0, 2 * math.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([x, -(y + 2.5)], axis=1) / 16.0, 255)]


def _arrow() -> Outline:
    points = [(1, 0), (0.15, 0.8), (0.15, 0.28), (-1, 0.28), (-1, -0.28), (0.15, -0.28), (0.15, -0.8)]
    return [(np.array(points, dtype=np.float64), 255)]


def _spiral() -> Outline:
    t = np.linspace(0.0, 1.0, 40)
    angle = t * 3.6 * math.pi
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    middle = (0.06 + 0.8 * t)[:, None]
    outer = direction * (middle + 0.13)
    inner = direction * np.maximum(middle - 0.13, 0.0)
    return [(np.concatenate([outer, inner[::-1]]), 255)]


# Shapes around the origin with a radius of about 1: polygons drawn in turn, 255 adds and 0 cuts out.
_OUTLINES: Final[dict[str, Outline]] = {
    "circle": [(_regular(48), 255)],
    "square": [(_regular(4), 255)],
    "triangle": [(_regular(3), 255)],
    "star": _star(),
    "ring": [(_regular(48), 255), (_regular(48) * 0.58, 0)],
    "cross": _cross(),
    "crescent": [(_regular(48), 255), (_regular(48) * 0.8 + np.array([0.45, 0.0]), 0)],
    "heart": _heart(),
    "arrow": _arrow(),
    "spiral": _spiral(),
}

#: Class names; the label of an image is the position of its class here.
CLASSES: Final[tuple[str, ...]] = tuple(_OUTLINES)


@dataclass(frozen=True)
class _Scene:
    """One generated image with the patches its object covers."""

    image: Image.Image
    label: int
    mask: npt.NDArray[np.bool_]


def _colour(rng: np.random.Generator) -> FloatArray:
    return rng.uniform(10.0, 245.0, 3)


def _rgb(colour: FloatArray) -> tuple[int, int, int]:
    r, g, b = (int(value) for value in colour)
    return r, g, b


def _pattern(rng: np.random.Generator, side: int) -> FloatArray:
    """A grey pattern ``[side, side]`` in [0, 1]: gradient, cloud, stripes or checks."""
    kind = int(rng.integers(4))
    if kind == 0 or kind == 1:
        cells = 2 if kind == 0 else int(rng.integers(4, 10))
        small = Image.fromarray(rng.uniform(0.0, 1.0, (cells, cells)).astype(np.float32))
        cloud = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
        return cloud.clip(0.0, 1.0)
    axis = np.arange(side, dtype=np.float64)
    angle, period = rng.uniform(0.0, math.pi), rng.uniform(6.0, 28.0)
    x, y = np.cos(angle) * axis[None, :], np.sin(angle) * axis[:, None]
    wave = np.sin((x + y) * (2 * math.pi / period))
    if kind == 3:
        u, v = np.sin(angle) * axis[None, :], np.cos(angle) * axis[:, None]
        wave = wave * np.sin((u - v) * (2 * math.pi / period))
    sharpness = rng.uniform(1.0, 6.0)
    stripes: FloatArray = 0.5 + 0.5 * np.clip(wave * sharpness, -1.0, 1.0)
    return stripes


def _background(rng: np.random.Generator) -> Image.Image:
    """Two blended patterns with pixel noise, RGB of side ``IMAGE_SIZE``."""
    first, second = _colour(rng), _colour(rng)
    # Moderate contrast inside the background leaves room for an object that stands out from it.
    second = first + (second - first) * rng.uniform(0.2, 0.6)
    base = first + _pattern(rng, IMAGE_SIZE)[:, :, None] * (second - first)
    tint = rng.uniform(-40.0, 40.0, 3)
    base += (_pattern(rng, IMAGE_SIZE)[:, :, None] - 0.5) * tint
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * rng.uniform(0.0, 10.0)
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


def _draw_clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """Thin lines and small blobs, all clearly smaller than an object."""
    for _ in range(int(rng.integers(2, 7))):
        ends = rng.uniform(0.0, side, 4)
        draw.line([float(end) for end in ends], fill=_rgb(_colour(rng)), width=int(rng.integers(1, 5)))
    for _ in range(int(rng.integers(6, 16))):
        x, y = rng.uniform(0.0, side, 2)
        radius = rng.uniform(0.012, 0.045, 2) * side
        box = (x - radius[0], y - radius[1], x + radius[0], y + radius[1])
        fill, kind = _rgb(_colour(rng)), int(rng.integers(3))
        if kind == 0:
            draw.ellipse(box, fill=fill)
        elif kind == 1:
            draw.rectangle(box, fill=fill)
        else:
            corners = _regular(3) @ _turn(rng.uniform(0.0, 2 * math.pi)) * radius.mean() * 1.3 + (x, y)
            draw.polygon(_flat(corners), fill=fill)


def _turn(angle: float) -> FloatArray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


def _flat(points: FloatArray) -> list[float]:
    flat: list[float] = points.ravel().tolist()
    return flat


def _object_alpha(rng: np.random.Generator, label: int) -> Image.Image:
    """The coverage of a randomly placed object, grey image of side ``IMAGE_SIZE``."""
    size = rng.uniform(*_OBJECT_PIXELS)
    stretch = np.array([1.0, rng.uniform(0.85, 1.0)])
    centre = rng.uniform(size / 2 + 1, IMAGE_SIZE - size / 2 - 1, 2)
    matrix = stretch[:, None] * _turn(rng.uniform(0.0, 2 * math.pi)) * (size / 2)
    corner = np.floor(centre - size / 2 - 1)
    side = int(size) + 4
    tile = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE))
    draw = ImageDraw.Draw(tile)
    for points, fill in _OUTLINES[CLASSES[label]]:
        draw.polygon(_flat((points @ matrix + (centre - corner)) * _SUPERSAMPLE), fill=fill)
    alpha = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    alpha.paste(tile.reduce(_SUPERSAMPLE), (int(corner[0]), int(corner[1])))
    return alpha


def _contrasting_colour(rng: np.random.Generator, image: Image.Image, alpha: Image.Image) -> FloatArray:
    """A random colour that differs from what the object is going to cover."""
    behind = np.asarray(image.resize((1, 1), Image.Resampling.BOX, alpha.getbbox()), dtype=np.float64)[0, 0]
    best = _colour(rng)
    for _ in range(20):
        if np.linalg.norm(best - behind) >= _MIN_CONTRAST:
            break
        best = _colour(rng)
    return best


def _draw_scene(rng: np.random.Generator, label: int) -> _Scene:
    side = IMAGE_SIZE * _CANVAS_SCALE
    canvas = _background(rng).resize((side, side), Image.Resampling.NEAREST)
    _draw_clutter(ImageDraw.Draw(canvas), rng, side)
    image = canvas.reduce(_CANVAS_SCALE)
    alpha = _object_alpha(rng, label)
    colour = _contrasting_colour(rng, image, alpha)
    shade = colour + (_pattern(rng, IMAGE_SIZE)[:, :, None] - 0.5) * rng.uniform(0.0, 50.0)
    image.paste(Image.fromarray(shade.clip(0, 255).astype(np.uint8)), mask=alpha)
    coverage = np.asarray(alpha, dtype=np.float64) / 255.0
    patches = coverage.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean(axis=(1, 3))
    return _Scene(image, label, patches >= _MASK_COVERAGE)


class DemoImages(Dataset[tuple[Image.Image, int]]):
    """Generated images, each with one object of one of ``CLASSES``.

    Item ``i`` is ``(image, label)``: a Pillow RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels and the
    class number. Every ten consecutive images hold each class once, in random order. The packaged model
    was trained on ``split="train"`` with seed 0 and validated on ``split="val"`` with seed 0; the splits use
    separate random streams.

    Args:
        count: Number of images, at least 1.
        seed: Any non-negative integer.
        split: ``"train"`` or ``"val"``.

    Raises:
        ValueError: If an argument lies outside the values above.
    """

    def __init__(self, count: int, seed: int = 0, split: str = "val") -> None:
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
        self.count = count
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        scene = self._scene(index)
        return scene.image, scene.label

    def label(self, index: int) -> int:
        """The class number of image ``index``, without drawing it. Raises IndexError out of range."""
        index = self._check(index)
        order = self._rng(1, index // len(CLASSES)).permutation(len(CLASSES))
        return int(order[index % len(CLASSES)])

    def object_mask(self, index: int) -> torch.Tensor:
        """Patches the object of image ``index`` covers: bool ``[GRID, GRID]``, rows from the top.

        A patch counts when at least a tenth of its pixels belong to the object. Raises IndexError out of range.
        """
        return torch.from_numpy(self._scene(index).mask)

    def with_mask(self, index: int) -> tuple[Image.Image, int, torch.Tensor]:
        """Image, class number and ``object_mask`` of ``index`` in one drawing. Raises IndexError out of range."""
        scene = self._scene(index)
        return scene.image, scene.label, torch.from_numpy(scene.mask)

    def _check(self, index: int) -> int:
        if not -self.count <= index < self.count:
            raise IndexError(f"index is {index}; it must lie in [{-self.count}, {self.count - 1}]")
        return index % self.count

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        return np.random.default_rng((GENERATOR_VERSION, SPLITS[self.split], self.seed, stream, index))

    def _scene(self, index: int) -> _Scene:
        label = self.label(index)
        return _draw_scene(self._rng(0, self._check(index)), label)
