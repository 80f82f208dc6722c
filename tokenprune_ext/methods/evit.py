"""EViT: keep what the class token attends to, fuse the rest into one token by the same attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import register
from .topk import TopK


@register
@dataclass(frozen=True, kw_only=True)
class EViT(TopK):
    """The score of Top-K; the inattentive tokens become one, behind the kept ones.

    A keep ratio leaves ``ceil(ratio * n)`` tokens and the fused one, as in the paper.

    Args:
        reduction: ``sum`` as published, or any other (``weighted`` is its normalised form); see ``ScoredMethod``.
        proportional: see ``ScoredMethod``.

    Source: Liang et al., "EViT: Expediting Vision Transformers via Token Reorganizations", ICLR 2022, section 3.
    """

    name: ClassVar[str] = "evit"

    reduction: str = "sum"

    def keep_count(self, ratio: float, num_patches: int) -> int:
        fused = self.min_keep(num_patches) - 1
        return min(num_patches, math.ceil(ratio * num_patches - 1e-9) + fused)
