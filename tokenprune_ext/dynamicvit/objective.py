"""DynamicViT as an objective of the training loop (a ``GroupedObjective`` and ``DrawingObjective``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune_ext.patch import inspect_host
from tokenprune_ext.prune import apply, remove
from tokenprune_ext.schedule import Schedule
from tokenprune_ext.train.objective import groups_at
from tokenprune_ext.train.randomness import Draws

from .losses import loss
from .masked import Masked, MaskedViT, Noise, teach
from .predictors import PREDICTORS, add_predictors, predictors_of


class Student(nn.Module):
    """A model that is masked in training mode, and really pruned in eval mode.

    Args:
        model: a dense model with predictors; it becomes the submodule ``masked.model``.
        keep: keep ratio of each stage, in (0, 1].
    """

    def __init__(self, model: nn.Module, keep: float) -> None:
        super().__init__()
        layers = [place - 1 for place in predictors_of(model).before]
        self.schedule = Schedule.build(model, "dynamicvit", layers=layers, keep=keep)
        self.masked = MaskedViT(model).train()

    def train(self, mode: bool = True) -> Student:
        """Switch; the mode of the model decides which of the two it is."""
        super().train(mode)
        if mode:
            remove(self.masked.model)
        else:
            apply(self.masked.model, self.schedule)
        return self

    def forward(self, images: Tensor, noise: Noise = Tensor.exponential_) -> Masked | Tensor:
        """What ``MaskedViT`` gives in training mode; class scores ``[B, classes]`` of the pruned model in eval mode."""
        return self.masked(images, noise=noise) if self.training else self.masked.model(images)


class DynamicViTObjective:
    """Train predictors, and the model along with them, to do with fewer tokens what a dense teacher does.

    Args:
        teacher: a dense timm VisionTransformer as wide as the model, usually a copy of it from before; it is moved to
            the model's device and not trained.
        keep: target keep ratio of each stage, in (0, 1].
        before: the blocks behind new predictors (``add_predictors``); a model that has some keeps those.
        backbone_lr_scale: learning rate of the model over that of the predictors; 0.01 as published.
        label_smoothing: share of every target that is spread over all classes, in [0, 1).
        ratio_weight, tokens_weight, kl_weight: see ``loss``.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self,
        teacher: nn.Module,
        keep: float = 0.7,
        *,
        before: Sequence[int] | None = None,
        backbone_lr_scale: float = 0.01,
        label_smoothing: float = 0.0,
        ratio_weight: float = 2.0,
        tokens_weight: float = 0.5,
        kl_weight: float = 0.5,
    ) -> None:
        weights = {"ratio_weight": ratio_weight, "tokens_weight": tokens_weight, "kl_weight": kl_weight}
        for name, value in {**weights, "backbone_lr_scale": backbone_lr_scale}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self.teacher, self.keep, self.before = teacher, float(keep), before
        self.backbone_lr_scale = backbone_lr_scale
        self.draws: Draws | None = None
        self.weights, self.criterion = weights, partial(F.cross_entropy, label_smoothing=label_smoothing)

    def prepare(self, model: nn.Module) -> Student:
        """The student; a model without predictors gets new ones.

        Raises:
            UnsupportedModelError: model or teacher cannot be trained so.
            ValueError: the teacher is of another width or grid.
        """
        mine, theirs = inspect_host(model), inspect_host(self.teacher)
        for name in ("channels", "num_patches"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(f"the teacher has {name} {getattr(theirs, name)}, the model {getattr(mine, name)}")
        if not hasattr(model, PREDICTORS):
            add_predictors(model, self.before)
        self.teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        return Student(model.requires_grad_(True), self.keep)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of ``losses.loss``, its terms, and the share of tokens behind the last stage."""
        student = model(images, Tensor.exponential_ if self.draws is None else self.draws.exponential)
        taught = teach(self.teacher, images)
        terms = loss(student, taught, targets, self.keep, criterion=self.criterion, **self.weights)._asdict()
        return terms.pop("total"), {**terms, "kept": student.masks[:, -1].detach().mean()}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Predictors first, at the full learning rate, the others at a part of it; no decay of biases and norms."""
        own = list(predictors_of(_student(model).masked.model).parameters())
        known = set(map(id, own))
        rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
        return groups_at([(own, 1.0), (rest, self.backbone_lr_scale)], weight_decay)

    def finish(self, model: nn.Module) -> nn.Module:
        """The trained model, pruned by its predictors, in eval mode."""
        return _student(model).eval().masked.model


def _student(model: nn.Module) -> Student:
    if not isinstance(model, Student):
        raise TypeError(f"expected what prepare gave, got {type(model).__name__}")
    return model
