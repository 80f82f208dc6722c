"""Zero-TPrune: importance by weighted page rank on the attention graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.checks import check_choice, check_int
from tokenprune_ext.patch.context import AttentionContext
from tokenprune_ext.patch.host import Host

from .base import Method, check_number, register, scaled_layers


@register
@dataclass(frozen=True)
class ZeroTPrune(Method):
    """The importance stage (I-stage) of Zero-TPrune: page rank per head, head filter, root mean square over heads.

    Args:
        start: scores the iteration begins with: ``uniform``, or ``class``, where the class token weighs sqrt(N) times
            as much; ``auto`` is ``class`` for models that have a class token.
        iters: iterations in the first quarter of the blocks, in the middle, and in the last quarter.
        tol: an image's head stops after the iteration that changes it by less than ``tol`` a token on average.
        tau: temperature of the attention that is ranked.
        vmin: smallest variance of a head's scores over the patch tokens that passes the head filter.
        vmax: largest such variance.

    Source: Wang, Dedhia, Jha, "Zero-TPrune", CVPR 2024, section 3.2. Scores are on the mean-1 scale, on which the
    published variance bounds apply. The similarity stage (section 3.3) is not part of it.
    """

    name: ClassVar[str] = "zero_tprune"
    where: ClassVar[Literal["attention", "block"]] = "block"

    start: str = "auto"
    iters: tuple[int, int, int] = (30, 5, 1)
    tol: float = 1e-6
    tau: float = 1.0
    vmin: float = 0.01
    vmax: float = 0.7

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("auto", "class", "uniform"))
        if not isinstance(self.iters, list | tuple) or len(self.iters) != 3:
            raise ValueError(f"iters must be three counts (first, middle, last blocks), got {self.iters!r}")
        for count in self.iters:
            check_int("iters", count, 1)
        object.__setattr__(self, "iters", tuple(self.iters))  # JSON has lists only
        check_number("tol", self.tol, 0)
        check_number("tau", self.tau, 0, strict=True)
        check_number("vmin", self.vmin, 0)
        check_number("vmax", self.vmax, self.vmin)

    def check_host(self, host: Host) -> None:
        """Raises ValueError when the class token is to weigh more and there is none."""
        if self.start == "class" and not host.has_class_token:
            raise ValueError(f"start='class' needs a class token, and {host.model} has none")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """After blocks 2, 5 and 8 of 12."""
        return tuple(sorted({max(boundary - 1, 0) for boundary in scaled_layers((3, 6, 9), depth)}))

    def iterations(self, layer: int, depth: int) -> int:
        """Power iterations at a block: many while attention is flat, one where it is sharp."""
        edge = depth // 4
        first, middle, last = self.iters
        return first if layer < edge else last if layer >= depth - edge else middle

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Importance ``[B, N]``, float32 (float64 for float64)."""
        iters = self.iterations(ctx.layer, ctx.depth)
        ranks = ops.wpr_qk(ctx.q, ctx.k, ctx.scale / self.tau, self._start(ctx), iters, self.tol)
        return ops.head_aggregate(ranks, self.vmin, self.vmax, ctx.num_prefix)

    def _start(self, ctx: AttentionContext) -> Tensor | None:
        """The first scores ``[N]``; None for ones."""
        if self.start == "uniform" or not ctx.has_class_token:
            return None
        tokens = ctx.q.shape[2]
        is_class = torch.arange(tokens, device=ctx.q.device) == 0
        return 1 + (tokens**0.5 - 1) * is_class.to(torch.promote_types(ctx.q.dtype, torch.float32))
