"""Random removal: the baseline every method has to beat, and the accuracy proxy of the tail-effect schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune_ext.checks import check_int
from tokenprune_ext.patch.context import AttentionContext

from .base import register, scaled_layers
from .scored import ScoredMethod

_MASK = 0xFFFFFFFF


@register
@dataclass(frozen=True, kw_only=True)
class Random(ScoredMethod):
    """The same random choice for every image; it depends on the seed, the layer and the token's position alone.

    Args:
        seed: non-negative int.

    Source: the random baseline of Zero-TPrune (CVPR 2024) and of POMT (WACV 2025).
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks 3, 6 and 9 of 12."""
        return scaled_layers((3, 6, 9), depth)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Pseudo-random scores in [0, 1), ``[B, N]`` float32."""
        return random_scores(ctx, self.seed)


def random_scores(ctx: AttentionContext, seed: int) -> Tensor:
    """Pseudo-random scores in [0, 1), ``[B, N]`` float32, the same for every image; no generator state."""
    batch, tokens = ctx.x.shape[:2]
    salt = (seed * 0x9E3779B1 + (ctx.layer + 1) * 0x85EBCA77) & _MASK
    bits = _mix(_mix(torch.arange(tokens, device=ctx.x.device)) ^ salt)
    return (bits >> 8).to(torch.float32).mul(2.0**-24).expand(batch, -1)  # 24 bits are exact in float32


def _mix(bits: Tensor) -> Tensor:
    """An invertible 32-bit mixer in int64; its products stay below 2**63, so no backend overflows."""
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & _MASK
    return bits ^ (bits >> 16)
