"""What goes from block to block of a pruned model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenState(NamedTuple):
    """The tokens, and what later blocks must know of them.

    A block hands on a plain tensor as long as there is nothing more to know. A state is a tuple of tensors, made anew
    by every layer that prunes, so that a forward stays a pure function: it can be compiled, exported and checkpointed.

    Attributes:
        x: tokens ``[B, N, C]``, prefix tokens first.
        size: how many patches each token stands for, ``[B, N]``, float32 (float64 for float64), 0 for padding; None
            while every token stands for itself.
        bias: what every later block adds to its attention logits, ``[B, 1, 1, N]`` in the dtype of the attention:
            log(size); None for nothing.
        position: where on the patch grid each patch token is, int64 ``[B, N - num_prefix]``; None when no block needs
            it, or while all are in their places.
        source: for every original patch, the position among the patch tokens of the one that stands for it, or -1;
            int64 ``[B, n0]``. None unless whoever runs the blocks put one in; then every block hands on a state.
    """

    x: Tensor
    size: Tensor | None = None
    bias: Tensor | None = None
    position: Tensor | None = None
    source: Tensor | None = None

    def handed_on(self) -> TokenState | Tensor:
        """The state, or the tokens alone when there is nothing else."""
        return self.x if self.size is self.position is self.source is None else self


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, N]`` -> ``[B, 1, 1, N]``: added to the logits, a key counts as often as the patches it stands for."""
    bias = size.log()
    return (bias if bias.dtype == dtype else bias.to(dtype)).view(size.shape[0], 1, 1, size.shape[1])
