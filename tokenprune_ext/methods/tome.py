"""ToMe, token merging: the most similar pairs of two alternating groups become one token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune_ext import ops
from tokenprune_ext.checks import check_bool, check_choice
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from .base import Method, check_number, register
from .scored import merge_into

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Token merging by bipartite soft matching of the keys averaged over the heads.

    A cost target spreads the removed tokens evenly over the layers, or on a linear ramp; :meth:`keep_from_r` gives the
    counts of the paper's ``r``. A layer removes at most half of its patch tokens.

    Args:
        inflection: slope of the ramp, -1 to 1: 0 removes equally many at every layer; 1 removes none at the first and
            most at the last; -1 the other way round.
        proportional: log(size) is added to the attention logits (the paper's proportional attention).
        reduction: ``merge`` the pairs, or ``drop`` one of each.

    Source: Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023, section 3.
    """

    name: ClassVar[str] = "tome"

    inflection: float = 0.0
    proportional: bool = True
    reduction: str = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("inflection", self.inflection, -1)
        if self.inflection > 1:
            raise ValueError(f"inflection must be at most 1, got {self.inflection}")
        check_bool("proportional", self.proportional)
        check_choice("reduction", self.reduction, ("merge", "drop"))

    @property
    def carries_size(self) -> bool:
        return self.reduction == "merge"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Every block."""
        return tuple(range(depth))

    def min_keep(self, entering: int) -> int:
        """Half of them, rounded up."""
        return entering - entering // 2

    def plan(self, strength: float, layers: Sequence[int], num_patches: int) -> dict[int, int]:
        r = (1 - strength) * num_patches / 2
        return dict(zip(layers, self._counts(self._ramp(r, len(layers)), num_patches), strict=True))

    def keep_from_r(self, r: float | Sequence[int], num_layers: int, num_patches: int) -> list[int]:
        """Patch tokens that leave each of ``num_layers`` layers, for ``apply(keep=...)``.

        Args:
            r: tokens removed by each layer, or their average when there is an ``inflection``; or one number a layer.
            num_layers: layers that prune.
            num_patches: patch tokens that enter the first of them.

        Raises:
            ValueError: ``r`` is negative, or has another length than ``num_layers``.
        """
        removed = list(r) if isinstance(r, Sequence) else self._ramp(r, num_layers)
        if len(removed) != num_layers or min(removed, default=0) < 0:
            raise ValueError(f"r must be one number from 0 on, or {num_layers} of them, got {r!r}")
        return self._counts(removed, num_patches)

    def _ramp(self, r: float, num_layers: int) -> list[float]:
        middle = (num_layers - 1) / 2
        return [r * (1 + self.inflection * (i - middle) / max(middle, 0.5)) for i in range(num_layers)]

    def _counts(self, removed: Sequence[float], num_patches: int) -> list[int]:
        counts: list[int] = []
        left, entering = float(num_patches), num_patches
        for r in removed:
            left = max(left - r, left / 2)  # fractions are carried on, so that an average r is one
            entering = max(math.ceil(left - 1e-9), self.min_keep(entering))  # rounding may ask for one too many
            counts.append(entering)
        return counts

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        # The sums over the heads are as similar to each other as their means.
        dropped, match, kept = ops.bipartite_match(ctx.k, None, ctx.num_patches - keep, ctx.num_prefix)
        if self.reduction == "drop":
            return Reduced(ctx.take(ctx.x, kept), kept)
        return merge_into(ctx, kept, dropped, match, self.proportional)

    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        patches = tokens - host.num_prefix_tokens
        return (patches // 2) * (patches - patches // 2) * cost.head_dim
