"""ATS, adaptive token sampling: how many tokens stay depends on the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

from .base import Method, register, scaled_layers

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class ATS(Method):
    """Inverse transform sampling of the class token's attention times the length of the value vector, at K quantiles.

    Shapes stay static: ``keep`` is K, the number of quantiles ``(k - 1/2) / K``. Where several fall on one token, fewer
    tokens stay; the places left over are padding, which nothing attends to (its ``size`` is 0). An image that keeps few
    tokens therefore computes no faster. :func:`tokenprune_ext.trace` counts what each image kept.

    Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, section 3.
    """

    name: ClassVar[str] = "ats"

    def check_host(self, host: Host) -> None:
        super().check_host(host)
        if not host.has_class_token:
            raise ValueError(f"ats scores by the class token, and {host.model} has none")
        if host.head_tokens is None:
            raise ValueError(f"ats pads with tokens that must not reach the classifier, and {host.model} reads all")

    @property
    def carries_size(self) -> bool:
        return True

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks 3 to 11 of 12."""
        return tuple(range(scaled_layers((3,), depth)[0], depth))

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        scores = self.scores(ctx)
        x, kept, size, log_size = ops.quantile_gather(ctx.x, scores, keep, ctx.num_prefix)
        return Reduced(x, kept, size=size, log_size=log_size, bias=True, scores=lambda: scores)

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Attention of the class token times length of the value vector, summed over the heads, ``[B, N]``."""
        return ctx.attention_given("sum", value_length=True)

    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        return 2 * tokens * cost.heads * cost.head_dim
