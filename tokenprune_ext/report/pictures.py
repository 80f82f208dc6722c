"""Pictures of the patches a pruned model keeps: dropped ones darkened, fused ones tinted."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenprune_ext.prune import trace

DROPPED, KEPT, FUSED = 0, 1, 2
# Weight of the image and colour added, by state: what is not kept recedes, also in dark and in bright images.
_LOOK = {DROPPED: (0.18, (16, 22, 46)), KEPT: (1.0, (0, 0, 0)), FUSED: (0.4, (112, 62, 0))}


@dataclass(frozen=True)
class Stage:
    """What stands for each patch after one pruning layer: `states` [rows, columns] of DROPPED, KEPT or FUSED."""

    block: int
    states: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Number of patches by state."""
        values = {"kept": KEPT, "fused": FUSED, "dropped": DROPPED}
        return {name: int((self.states == value).sum()) for name, value in values.items()}


@dataclass(frozen=True)
class Progression:
    """One variant on one image, layer by layer."""

    variant: str
    prediction: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Picture:
    """One image (uint8 [H, W, 3], as the model sees it) and what every variant keeps of it."""

    name: str
    label: str | None
    prediction: str
    pixels: np.ndarray
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

    def named(index: int) -> str:
        return f"class {index}" if class_names is None else class_names[index]

    with torch.inference_mode():
        dense_best = dense(images).argmax(dim=1).tolist()
        traces = {name: trace(model, images) for name, model in variants.items()}
    grid = _grid(dense, images)
    progressions: list[list[Progression]] = [[] for _ in names]
    for variant, traced in traces.items():
        best = traced.output.argmax(dim=1).tolist()
        states = {block: patch_states(source).cpu().numpy() for block, source in sorted(traced.sources.items())}
        for i, own in enumerate(progressions):
            stages = tuple(Stage(block, state[i].reshape(grid)) for block, state in states.items())
            own.append(Progression(variant, named(best[i]), stages))
    pixels = _denormalise(images, mean, std)
    return tuple(
        Picture(
            name=names[i],
            label=named(labels[i]) if labels[i] >= 0 else None,
            prediction=named(dense_best[i]),
            pixels=pixels[i],
            progressions=tuple(progressions[i]),
        )
        for i in range(len(names))
    )


def patch_states(source: Tensor) -> Tensor:
    """State of every patch, uint8 [B, patches], from the positions of the tokens that stand for them.

    Args:
        source: int64 [B, patches]; -1 for a patch for which no token stands.
    """
    lost = source < 0
    position = source.masked_fill(lost, 0)
    members = torch.zeros_like(source).scatter_add_(1, position, (~lost).to(source.dtype))
    shared = members.gather(1, position) > 1
    states = torch.where(shared, FUSED, KEPT).masked_fill(lost, DROPPED)
    return states.to(torch.uint8)


def draw(pixels: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The image (uint8 [H, W, 3]) with every patch shown by its state [rows, columns]."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * states.shape[0] // height
    columns = np.arange(width) * states.shape[1] // width
    state = states[rows][:, columns][..., None]
    shown = np.zeros(pixels.shape, dtype=np.float32)
    for value, (weight, colour) in _LOOK.items():
        shown = np.where(state == value, weight * pixels + np.array(colour, dtype=np.float32), shown)
    return shown.round().astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """A uint8 image [H, W, 3] as a JPEG in a data: URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[2:])  # type: ignore[operator, union-attr]
    return int(rows), int(columns)


def _denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    shape = (1, 3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(shape)
    shift = torch.tensor(mean, dtype=torch.float32).view(shape)
    pixels = images.float().cpu() * scale + shift
    return np.asarray(pixels.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1))
