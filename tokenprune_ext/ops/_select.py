"""The order of tokens by a score, in plain torch: what every selection has in common."""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(scores: Tensor, num_prefix: int) -> Tensor:
    """Positions of the patch tokens by their scores ``[B, N]``, the highest first; int64 ``[B, N - num_prefix]``."""
    # Negated and ascending: equal scores keep the lower position first, and NaN comes last.
    return torch.sort(-scores[:, num_prefix:], dim=1, stable=True).indices + num_prefix


def split(scores: Tensor, keep: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Positions of the ``keep`` patch tokens with the highest scores ``[B, N]``, and of the others, each ascending."""
    order = ranked(scores, num_prefix)
    return order[:, :keep].sort(1).values.contiguous(), order[:, keep:].sort(1).values.contiguous()
