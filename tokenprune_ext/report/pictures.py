"""What pruned models do to the patches of a few images, layer by layer, ready to be drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenprune_ext.patch import Host, inspect_host
from tokenprune_ext.prune import Trace, trace

from .panels import Array, Pixels


@dataclass(frozen=True)
class Stage:
    """One image behind one pruning layer; arrays are [rows, columns] of patches.

    Attributes:
        block: 0-based index of the layer.
        source: the token that stands for each patch, int64; -1 for none.
        kept: whether the patch's own token is left, bool.
        scores: what the layer ranked the patch's token by, NaN for nothing; None when the method does not rank.
    """

    block: int
    source: Array
    kept: Array
    scores: Array | None = None

    @property
    def tokens(self) -> int:
        """Patch tokens that are left."""
        return len(np.unique(self.source[self.source >= 0]))

    @property
    def counts(self) -> dict[str, int]:
        """Number of patches by what became of them: kept alone, in one token with others, or dropped."""
        _, sizes = np.unique(self.source[self.source >= 0], return_counts=True)
        alone = int((sizes == 1).sum())
        return {"kept": alone, "merged": int(sizes.sum()) - alone, "dropped": int((self.source < 0).sum())}


@dataclass(frozen=True)
class Progression:
    """One variant on one image, layer by layer; no prediction from a model without a classifier."""

    variant: str
    prediction: str | None
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Picture:
    """One image (as the model sees it) and what every variant keeps of it."""

    name: str
    label: str | None
    prediction: str | None
    pixels: Pixels
    progressions: tuple[Progression, ...]


def take_pictures(
    dense: nn.Module,
    variants: Mapping[str, nn.Module],
    images: Tensor,
    *,
    labels: Sequence[int],
    names: Sequence[str],
    class_names: Sequence[str] | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Picture, ...]:
    """Trace the variants on a few images.

    Args:
        dense: the unpruned model, for its prediction.
        variants: pruned models by name.
        images: normalised images [B, 3, H, W] on the models' device and in their dtype.
        labels: class index per image, below 0 where there is none.
        names: one caption per image.
        class_names: names of the classes in order, or None.
        mean, std: the normalisation to undo, per channel.
    """
    classifies = bool(getattr(dense, "num_classes", 0))

    def named(index: int) -> str:
        return f"class {index}" if class_names is None else class_names[index]

    def best(output: Tensor) -> list[str | None]:
        return [named(index) for index in output.argmax(1).tolist()] if classifies else [None] * len(names)

    with torch.inference_mode():
        predictions = best(dense(images))
        traces = {name: trace(model, images) for name, model in variants.items()}
    grid = _grid(inspect_host(dense), images)
    progressions: list[list[Progression]] = [[] for _ in names]
    for variant, traced in traces.items():
        stages = _stages(traced, grid)
        for own, prediction, image in zip(progressions, best(traced.output), range(len(names)), strict=True):
            own.append(Progression(variant, prediction, tuple(layer[image] for layer in stages)))
    pixels = _denormalise(images, mean, std)
    return tuple(
        Picture(
            name=names[i],
            label=named(labels[i]) if labels[i] >= 0 else None,
            prediction=predictions[i],
            pixels=pixels[i],
            progressions=tuple(progressions[i]),
        )
        for i in range(len(names))
    )


def data_uri(pixels: Pixels) -> str:
    """A uint8 image [H, W, 3] as a JPEG in a data: URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _grid(host: Host, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; images may be of another size than the host's own."""
    rows, columns = (
        -(-side * count // own) for side, count, own in zip(images.shape[2:], host.grid, host.input_size, strict=True)
    )
    return rows, columns


def _stages(traced: Trace, grid: tuple[int, int]) -> list[list[Stage]]:
    """Per pruning layer one stage an image."""

    def arrays(maps: Mapping[int, Tensor], layer: int) -> Array:
        found = maps[layer]  # NumPy has no bfloat16
        return (found.double() if found.is_floating_point() else found).cpu().numpy().reshape(-1, *grid)

    found = []
    for layer in sorted(traced.sources):
        source, kept = arrays(traced.sources, layer), arrays(traced.kept, layer)
        scores = arrays(traced.scores, layer) if layer in traced.scores else [None] * len(source)
        found.append([Stage(layer, *parts) for parts in zip(source, kept, scores, strict=True)])
    return found


def _denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    shape = (1, 3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(shape)
    shift = torch.tensor(mean, dtype=torch.float32).view(shape)
    pixels = images.float().cpu() * scale + shift
    return np.asarray(pixels.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1))
