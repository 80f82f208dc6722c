"""The predictors of DynamicViT, and how a timm vision transformer carries them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenprune_ext.checks import check_int
from tokenprune_ext.patch import Host, inspect_host, unsupported
from tokenprune_ext.patch.mixin import dense_class

PREDICTORS = "score_predictor"  # as published state dicts call them


class Predictor(nn.Module):
    """Whether each patch token is worth keeping, from its own features and the mean of those still there.

    Args:
        channels: width of the tokens, a multiple of 4.

    Source: DynamicViT (NeurIPS 2021), section 3.2. Submodules are named as in published state dicts.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(channels, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probabilities of keeping and of dropping, ``[B, n, 2]``, float32 (float64 for float64).

        Args:
            x: patch tokens ``[B, n, C]``.
            mask: 1 for the tokens that are still there and 0 for the others, ``[B, n]``; None for all.
        """
        own, others = self.in_conv(x).chunk(2, dim=-1)
        if mask is None:
            mean = others.mean(1, keepdim=True)
        else:
            there = mask.unsqueeze(-1).to(others.dtype)
            mean = (others * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
        logits = self.out_conv(torch.cat([own, mean.expand_as(own)], dim=-1))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Predictors(nn.ModuleList):
    """One predictor in front of each of some blocks.

    Attributes:
        before: 0-based indices of those blocks, ascending.
    """

    def __init__(self, channels: int, before: Sequence[int]) -> None:
        super().__init__(Predictor(channels) for _ in before)
        self.before = tuple(before)


def default_places(depth: int, count: int = 3) -> tuple[int, ...]:
    """The blocks that ``count`` predictors stand in front of, evenly spread: 3, 6 and 9 of 12."""
    return tuple(sorted({max(1, depth * stage // (count + 1)) for stage in range(1, count + 1)}))


def add_predictors(model: nn.Module, before: Sequence[int] | None = None) -> nn.Module:
    """Give a model untrained predictors, as its submodule ``score_predictor``; the same model is returned.

    What the model computes stays as it is, until ``tokenprune_ext.apply(model, "dynamicvit", ...)``.

    Args:
        model: a timm VisionTransformer that classifies by its class token (ViT, DeiT).
        before: 0-based indices of the blocks behind the predictors, ascending; 3, 6 and 9 of 12 by default.

    Raises:
        UnsupportedModelError: another model.
        ValueError: it has predictors already, or ``before`` is not allowed.
        TypeError: ``before`` holds something else than ints.
    """
    host = inspect_host(model)
    _check_model(model, host)
    if hasattr(model, PREDICTORS):
        raise ValueError(f"{host.model} has predictors already, as {PREDICTORS}")
    places = default_places(host.depth) if before is None else tuple(before)
    if not places or sorted(set(places)) != list(places):
        raise ValueError(f"before must be block indices, ascending without repeats, got {list(places)}")
    for place in places:
        check_int("before", place, 1, host.depth - 1, "the last block")
    predictors = Predictors(host.channels, places).train(model.training)
    parameter = next(model.parameters())
    setattr(model, PREDICTORS, predictors.to(parameter.device, parameter.dtype))
    return model


def predictors_of(model: nn.Module) -> Predictors:
    """The predictors of a model.

    Raises:
        ValueError: it has none.
    """
    predictors = getattr(model, PREDICTORS, None)
    if not isinstance(predictors, Predictors):
        raise ValueError(
            f"{dense_class(type(model)).__name__} has no trained predictors, which dynamicvit prunes by: load a "
            "DynamicViT checkpoint with tokenprune_ext.loading.load_model, or add and train them "
            "(tokenprune_ext.dynamicvit)"
        )
    return predictors


def count_predictors(keys: Collection[str]) -> int:
    """How many predictors a state dict with these keys holds."""
    return len({key.split(".")[1] for key in keys if key.startswith(f"{PREDICTORS}.")})


def _check_model(model: Any, host: Host) -> None:
    kind = dense_class(type(model))
    if kind is not VisionTransformer:
        raise unsupported(f"{kind.__name__} {host.model}", "DynamicViT is for timm's VisionTransformer (ViT, DeiT)")
    if not host.has_class_token or host.head_tokens is None:
        raise unsupported(host.model, "DynamicViT needs a classifier that reads the class token alone")
    if host.channels % 4:
        raise unsupported(host.model, f"its {host.channels} channels are no multiple of 4")
