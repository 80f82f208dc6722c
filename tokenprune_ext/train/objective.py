"""What a method is for the training loop, and plain fine-tuning as the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .randomness import Draws


class Objective(Protocol):
    """A method that trains. The loop calls the three in this order, with the model on its device."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module that is trained; it may be the model itself. In eval mode it gives class scores [B, classes].

        Every process calls it with the same generators; every parameter that requires a gradient has to get one.
        """
        ...

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and what is logged of it, all of them scalars.

        It is a mean over the images plus terms that do not depend on them, so that the loop can split a batch over
        processes and in time.

        Args:
            model: what `prepare` gave, in training mode, under autocast where that was asked for.
            images: float [B, 3, H, W].
            targets: int64 [B], or float [B, classes] where images are mixed.
        """
        ...

    def finish(self, model: nn.Module) -> nn.Module:
        """The trained model to save, from what `prepare` gave."""
        ...


@runtime_checkable
class GroupedObjective(Objective, Protocol):
    """An objective with a say in the optimiser."""

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of the parameters of what `prepare` gave; `lr_scale` of a group multiplies its learning rate."""
        ...


@runtime_checkable
class DrawingObjective(Objective, Protocol):
    """An objective whose loss draws random numbers for every image.

    Attributes:
        draws: where from; the loop sets it before every loss.
    """

    draws: Draws | None


def groups_at(parts: Sequence[tuple[Iterable[nn.Parameter], float]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser of parameters with the `lr_scale` of each; vectors (biases, norms) do not decay.

    The first part should have a scale of 1: it is its learning rate that is logged.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameters, scale in parts:
        for parameter in parameters:
            groups.setdefault((scale, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


class CrossEntropy:
    """Fine-tuning: cross entropy with the labels, and KL divergence from a teacher where there is one.

    Args:
        label_smoothing: share of every target that is spread over all classes, in [0, 1).
        teacher: gives class scores for the same images; it is moved to the model's device and not trained.
        teacher_weight: of KL(teacher || model), a mean over the images; at least 0.
    """

    def __init__(
        self, label_smoothing: float = 0.0, teacher: nn.Module | None = None, teacher_weight: float = 1.0
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not teacher_weight >= 0:
            raise ValueError(f"teacher_weight must be at least 0, got {teacher_weight}")
        self.label_smoothing, self.teacher, self.teacher_weight = label_smoothing, teacher, teacher_weight

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model itself, all of it trained."""
        if self.teacher is not None:
            self.teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        return model.requires_grad_(True)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, plus the weighted divergence."""
        scores = model(images).float()
        cross_entropy = F.cross_entropy(scores, targets, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return cross_entropy, {"cross_entropy": cross_entropy}
        with torch.no_grad():
            taught = self.teacher(images).float().log_softmax(1)
        divergence = F.kl_div(scores.log_softmax(1), taught, reduction="batchmean", log_target=True)
        parts = {"cross_entropy": cross_entropy, "divergence": divergence}
        return cross_entropy + self.teacher_weight * divergence, parts

    def finish(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model
