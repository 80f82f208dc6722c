"""How far a pruned model is from the dense one, on images that stay in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tokenprune_ext.evaluate import divergence, log_probabilities
from tokenprune_ext.prune import apply, remove
from tokenprune_ext.schedule import Schedule


class Objective:
    """Mean KL(dense || pruned) of the class distributions over some images, batch by batch.

    Args:
        model: the dense model, in eval mode; it is patched while a schedule is tried, and restored.
        images: inputs ``[M, 3, H, W]`` on the model's device, in its dtype.
        batch_size: images per forward.
    """

    def __init__(self, model: nn.Module, images: Tensor, batch_size: int) -> None:
        self.model = model
        self.batches = images.split(batch_size)
        self.dense = [log_probabilities(model, batch, "dense", range(len(batch))) for batch in self.batches]

    def divergences(self, schedule: Schedule) -> Iterator[Tensor]:
        """KL of every image ``[B]``, in nats, one batch after the other."""
        apply(self.model, schedule)
        try:
            for reference, batch in zip(self.dense, self.batches, strict=True):
                yield divergence(reference, log_probabilities(self.model, batch, schedule.method, range(len(batch))))
        finally:
            remove(self.model)

    def kl(self, schedule: Schedule) -> float:
        """Mean over all images."""
        return float(torch.cat(list(self.divergences(schedule))).mean())
