"""Images to search on, and others to judge what was found."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from tokenprune_ext.data import ImageSource, batches

_READ_AT_ONCE = 50


def split_images(
    images: ImageSource,
    transform: Callable[[Any], Any],
    holdout: float,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    workers: int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Read all images into memory, in two parts drawn at random with ``seed``.

    Args:
        images: at least one.
        transform: preprocessing of one PIL image.
        holdout: share of the images in the second part.
        dtype, device: of the inputs.
        workers: processes that read images.

    Returns:
        Inputs ``[M, 3, H, W]`` to search on; inputs and labels ``[K]`` (-1 for none) to judge on, None for no image.

    Raises:
        ValueError: nothing is left to search on.
        DataError: an image that cannot be read.
    """
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    kept = round(holdout * len(order))
    if kept == len(order):
        raise ValueError(f"holdout={holdout:g} leaves none of the {len(order)} images to search on")
    shuffled: Any = Subset(images, order)  # type: ignore[arg-type]
    loaded = list(batches(shuffled, transform, _READ_AT_ONCE, workers))
    inputs = torch.cat([batch for batch, _ in loaded]).to(device, dtype)
    labels = torch.cat([labels for _, labels in loaded]).to(device)
    return inputs[kept:], (inputs[:kept], labels[:kept]) if kept else None
