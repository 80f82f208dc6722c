"""A linear layer that lost channels on either side and looks the same from outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowLinear(nn.Linear):
    """Computes ``nn.Linear(in_features, out_features)`` in which the channels that were removed have weight 0.

    The weights of removed channels are not there: ``weight`` is ``[kept outputs, kept inputs]``. The input is gathered
    before the product, and behind it the outputs go to their places among zeros.

    Attributes:
        whole: the first so many outputs all have a row of weights.
        inputs: int64 ``[kept inputs]``, the channels that are read; None when all are.
        outputs: int64 ``[kept outputs - whole]``, those behind the whole ones that have a row, counted from there; None
            when all have.
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept_inputs: int,
        kept_outputs: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        whole: int = 0,
    ) -> None:
        super().__init__(kept_inputs, kept_outputs, bias, device, dtype)
        self.in_features, self.out_features, self.whole = in_features, out_features, whole
        inputs = None if kept_inputs == in_features else torch.arange(kept_inputs, device=device)
        outputs = None if kept_outputs == out_features else torch.arange(kept_outputs - whole, device=device)
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return self.write(F.linear(self.read(x), self.weight, self.bias))

    def read(self, x: Tensor) -> Tensor:
        """The input channels that have weights."""
        if self.inputs is None:
            return x
        return x.gather(-1, self.inputs.expand(*x.shape[:-1], -1))  # on CPUs several times as fast as index_select

    def write(self, out: Tensor, first: int = 0) -> Tensor:
        """All outputs from ``first`` on, which is one of the whole ones, from those that have rows."""
        if self.outputs is None:
            return out
        rest = out[..., self.whole - first :]
        zeros = rest.new_zeros(*rest.shape[:-1], self.out_features - self.whole)
        rest = zeros.scatter(-1, self.outputs.expand_as(rest), rest)
        return torch.cat([out[..., : self.whole - first], rest], -1)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        kept = f"kept_inputs={columns}, kept_outputs={rows}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kept}, bias={self.bias is not None}"
