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
        inputs: int64 ``[kept inputs]``, the channels that are read; None when all are.
        spread: int64 ``[out_features]``, the row of ``weight`` that makes each output, or the number of rows for one
            that is 0; None when there is a row for each.
    """

    inputs: Tensor | None
    spread: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept_inputs: int,
        kept_outputs: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(kept_inputs, kept_outputs, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        inputs = None if kept_inputs == in_features else torch.arange(kept_inputs, device=device)
        rows = torch.arange(out_features, device=device).clamp(max=kept_outputs)
        self.register_buffer("inputs", inputs)
        self.register_buffer("spread", None if kept_outputs == out_features else rows)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return self.write(F.linear(self.read(x), self.weight, self.bias))

    def read(self, x: Tensor) -> Tensor:
        """The input channels that have weights."""
        return x if self.inputs is None else x.index_select(-1, self.inputs)

    def write(self, out: Tensor, first: int = 0) -> Tensor:
        """Outputs from ``first`` on in their places, of the rows from ``first`` on: all before it have rows."""
        if self.spread is None:
            return out
        return F.pad(out, (0, 1)).index_select(-1, self.spread[first:] - first if first else self.spread)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        kept = f"kept_inputs={columns}, kept_outputs={rows}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kept}, bias={self.bias is not None}"
