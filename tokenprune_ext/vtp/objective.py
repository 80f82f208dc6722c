"""Sparsity training as an objective of the training loop (``tokenprune_ext.train.Objective``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenprune_ext.train.objective import CrossEntropy, groups_at

from .gates import LAMBDA, add_gates, gates_of, penalty


class SparsityObjective(CrossEntropy):
    """Train the weights together with gates, and pull the gates towards 0.

    Args:
        l1: weight of the sum of |gate|; 1e-4 as published.
        gate_lr_scale: learning rate of the gates over that of the weights. An optimiser like Adam moves a gate by the
            learning rate in a step, however strong the penalty is: what takes 100 epochs at 1 takes fewer at more.
        label_smoothing: share of every target that is spread over all classes, in [0, 1).

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(self, l1: float = LAMBDA, gate_lr_scale: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        for name, value in (("l1", l1), ("gate_lr_scale", gate_lr_scale)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.l1, self.gate_lr_scale = l1, gate_lr_scale

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with gates.

        Raises:
            UnsupportedModelError, ValueError: see ``add_gates``.
        """
        return super().prepare(add_gates(model))

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy plus the weighted penalty."""
        loss, parts = super().loss(model, images, targets)
        gates = penalty(model)
        return loss + self.l1 * gates, {**parts, "penalty": gates}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Gates at their own learning rate; no decay of gates, biases and norms."""
        gates = list(gates_of(model).values())
        known = set(map(id, gates))
        rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
        return groups_at([(rest, 1.0), (gates, self.gate_lr_scale)], weight_decay)
