"""DynamicViT: keep the tokens that a trained predictor wants to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from tokenprune_ext.checks import check_choice
from tokenprune_ext.dynamicvit.predictors import default_places, predictors_of
from tokenprune_ext.patch.context import AttentionContext
from tokenprune_ext.patch.host import Host

from .base import register
from .scored import ScoredMethod

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@register
@dataclass(frozen=True, kw_only=True)
class DynamicViT(ScoredMethod):
    """Static top-k by the predictors that the model carries, one in front of every block they were trained for.

    Pruning in front of block i is pruning behind block i - 1, which is the layer of a schedule. Needs a model with
    trained predictors: ``loading.load_model`` reads published files, ``tokenprune_ext.dynamicvit`` trains new ones.

    Args:
        reduction: ``drop`` as published, ``mean`` or ``merge``; see ``ScoredMethod``.
        proportional: see ``ScoredMethod``.

    Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021,
    section 3.4.
    """

    name: ClassVar[str] = "dynamicvit"
    needs_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, ("drop", "mean", "merge"))

    @property
    def where(self) -> Literal["attention", "block"]:
        return "block"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Behind blocks 2, 5 and 8 of 12: in front of 3, 6 and 9."""
        return tuple(place - 1 for place in default_places(depth))

    def learned(self, model: nn.Module, layer: int) -> nn.Module:
        """The predictor in front of block ``layer + 1``.

        Raises:
            ValueError: the model has none, or has it elsewhere.
        """
        predictors = predictors_of(model)
        if layer + 1 not in predictors.before:
            layers = [place - 1 for place in predictors.before]
            raise ValueError(
                f"dynamicvit has no predictor to prune with at layer {layer}; the model has layers={layers}"
            )
        return predictors[predictors.before.index(layer + 1)]

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Log-probability of keeping ``[B, N]``: unlike the probability it does not round to 1."""
        assert ctx.learned is not None
        log_keep = ctx.learned(ctx.x[:, ctx.num_prefix :].detach())[..., 0].detach()
        return pad(log_keep, (ctx.num_prefix, 0))

    def score_macs(self, cost: BlockCost, host: Host, tokens: int) -> int:
        width = cost.channels
        linear = width * width + width * (width // 2) + (width // 2) * (width // 4) + (width // 4) * 2
        return (tokens - host.num_prefix_tokens) * linear
