"""Gates: one trained factor for every channel at the four places of every block.

With VTP's objective, task loss + 1e-4 * sum |gate|, those of channels that matter little go towards 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenprune_ext.channels import linears_of
from tokenprune_ext.patch import unsupported
from tokenprune_ext.patch.mixin import Mixin, dense_class, mixed_class
from tokenprune_ext.patch.narrow import NarrowLinear

LAMBDA = 1e-4  # the paper's weight of the penalty


class Gated(Mixin):
    """Mixin in front of ``nn.Linear``: the input is multiplied by ``gate``, ``[in_features]``, channel by channel."""

    prefix: ClassVar[str] = "Gated"
    gate: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        out: Tensor = super().forward(x * self.gate)
        return out


def add_gates(model: nn.Module) -> nn.Module:
    """Put gates of 1 into a model, in place. Its output stays the same; its state dict gets a ``gate`` for each place.

    Raises:
        UnsupportedModelError: the model is not understood, or lost channels already.
        ValueError: it has gates. In every case the model is left as it was.
    """
    linears = linears_of(model)
    if gates_of(model):
        raise ValueError("the model has gates already")
    for name, linear in linears.items():
        if isinstance(linear, NarrowLinear):
            raise unsupported(name, "it lost channels already, and gates go into a dense model")
    for linear in linears.values():
        linear.register_parameter("gate", nn.Parameter(torch.ones_like(linear.weight[0], requires_grad=False)))
        linear.__class__ = mixed_class(Gated, type(linear))  # type: ignore[assignment]
    return model


def remove_gates(model: nn.Module) -> nn.Module:
    """Undo :func:`add_gates` exactly; what the gates learned is lost. Does nothing to a model without gates."""
    for part in model.modules():
        if isinstance(part, Gated):
            del part.gate
            part.__class__ = dense_class(type(part))  # type: ignore[assignment]
    return model


def gates_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates of a model, also of a wrapped one, by the name of the linear layer they are in front of."""
    return {name: part.gate for name, part in model.named_modules() if isinstance(part, Gated)}


def penalty(model: nn.Module) -> Tensor:
    """``sum |gate|`` over all gates of a model, also of a wrapped one; a scalar to add, times lambda, to the task loss.

    Raises:
        ValueError: the model has no gates.
    """
    gates = gates_of(model)
    if not gates:
        raise ValueError("the model has no gates: call add_gates first")
    return torch.stack([gate.abs().sum() for gate in gates.values()]).sum()
