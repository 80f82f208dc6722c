"""Sparsity training as an objective of the training loop (``tokenprune_ext.train.Objective``)."""

from __future__ import annotations

from torch import Tensor, nn

from tokenprune_ext.train.objective import CrossEntropy

from .gates import LAMBDA, add_gates, penalty


class SparsityObjective(CrossEntropy):
    """Train the weights together with gates, and pull the gates towards 0.

    Args:
        l1: weight of the sum of |gate|; 1e-4 as published, for 100 epochs of ImageNet. What counts is how far a gate
            can move: fewer steps want more.
        label_smoothing: share of every target that is spread over all classes, in [0, 1).

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(self, l1: float = LAMBDA, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        if not l1 >= 0:
            raise ValueError(f"l1 must be at least 0, got {l1}")
        self.l1 = l1

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
