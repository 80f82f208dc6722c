"""The training form of DynamicViT: tokens are masked, not removed, so that the decisions can be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenprune_ext.patch import HostAdapter, Projected, adapter_of, inspect_host, record_of
from tokenprune_ext.patch.timm_features import embed

from .predictors import predictors_of

Noise = Callable[[Tensor], Tensor]


class Dense(NamedTuple):
    """What a teacher says.

    Attributes:
        logits: ``[B, classes]``.
        tokens: patch tokens behind the last norm, ``[B, n, C]``.
    """

    logits: Tensor
    tokens: Tensor


class Masked(NamedTuple):
    """What a student says.

    Attributes:
        logits: ``[B, classes]``.
        tokens: patch tokens behind the last norm, those that were dropped on the way too, ``[B, n, C]``.
        masks: behind every predictor, 1 for the tokens that are still there and 0 for the others, ``[B, stages, n]``;
            float32 (float64 for float64). Their gradient is that of the soft decisions.
    """

    logits: Tensor
    tokens: Tensor
    masks: Tensor


class MaskedViT(nn.Module):
    """A model with predictors, as it is trained: every block computes all tokens, and attention ignores the dropped.

    What becomes of the class token and of the kept tokens is what physically removing the others gives. Decisions are
    sampled with Gumbel noise in training mode; in eval mode a token stays where keeping is at least as likely.

    Args:
        model: a dense model with predictors (``add_predictors``); it becomes the submodule ``model``.

    Raises:
        UnsupportedModelError: the model is not understood.
        ValueError: it has no predictors, or is pruned.

    Source: DynamicViT (NeurIPS 2021), sections 3.2 and 3.3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inspect_host(model)
        predictors_of(model)
        if record_of(model) is not None:
            raise ValueError("the model is pruned: call tokenprune_ext.remove before it is trained")
        self.model = model

    def forward(self, images: Tensor, masks: Tensor | None = None, noise: Noise = Tensor.exponential_) -> Masked:
        """Logits, tokens and decisions of images ``[B, 3, H, W]``.

        Args:
            images: of the model's size.
            masks: decisions to use in place of the predictors', ``[B, stages, n]``; a token that was dropped once
                stays so.
            noise: fills a tensor ``[B, n, 2]`` with exponential noise and returns it.
        """
        model: Any = self.model
        predictors, adapter, prefix = predictors_of(model), adapter_of(model), model.num_prefix_tokens
        x, _ = embed(model, images)
        found: list[Tensor] = []
        for index, block in enumerate(model.blocks):
            if index in predictors.before:
                stage = len(found)
                before = found[-1] if found else None
                decision = (
                    self._decide(predictors[stage], x[:, prefix:], before, noise)
                    if masks is None
                    else masks[:, stage].to(torch.promote_types(x.dtype, torch.float32))
                )
                found.append(decision if before is None else decision * before)
            arguments = (adapter, block, x, found[-1]) if found else (x,)
            run = masked_block if found else block
            x = checkpoint(run, *arguments, use_reentrant=False) if model.grad_checkpointing else run(*arguments)
        x = model.norm(x)
        return Masked(model.forward_head(x), x[:, prefix:], torch.stack(found, 1))

    def _decide(self, predictor: nn.Module, x: Tensor, mask: Tensor | None, noise: Noise) -> Tensor:
        log_probabilities = predictor(x, mask)
        if self.training:
            return gumbel_decision(log_probabilities, noise)
        keep, drop = log_probabilities.unbind(-1)
        return (keep >= drop).to(keep.dtype)


def teach(model: nn.Module, images: Tensor) -> Dense:
    """Logits and patch tokens of a dense timm VisionTransformer, without gradients; its mode is not changed."""
    vit: Any = model
    with torch.no_grad():
        x = vit.forward_features(images)
        return Dense(vit.forward_head(x), x[:, vit.num_prefix_tokens :])


def gumbel_decision(log_probabilities: Tensor, noise: Noise = Tensor.exponential_) -> Tensor:
    """1 for every token that is kept and 0 for the others ``[B, n]``, sampled from ``[B, n, 2]``: (keep, drop).

    Straight through: exact zeros and ones, with the gradient of the Gumbel-softmax at temperature 1.
    """
    soft = (log_probabilities - noise(torch.empty_like(log_probabilities)).log()).softmax(-1)
    keep, drop = soft.unbind(-1)
    return (keep >= drop).to(keep.dtype) + (keep - keep.detach())


def masked_block(adapter: HostAdapter, block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A block of all tokens ``[B, N, C]``, with the patch tokens masked by ``[B, n]``."""
    prefix = mask.new_ones((mask.shape[0], x.shape[1] - mask.shape[1]))
    heads = masked_attention(adapter.project(block, x, x.shape[1], None), torch.cat([prefix, mask], 1))
    return adapter.add_mlp(block, adapter.add_attention(block, x, heads))


def masked_attention(p: Projected, mask: Tensor) -> Tensor:
    """Output of every head ``[B, H, N, d]``, where a token attends to those with mask 1 and to itself.

    The mask ``[B, N]`` multiplies the weights before they are normalised, so that a dropped token's has a gradient:
    what the others would get of it. The additive mask of fused attention has none there (-inf).
    """
    logits = (p.q * p.scale) @ p.k.transpose(-2, -1)
    weights = logits.softmax(-1, dtype=mask.dtype)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    weights = weights * torch.where(itself, 1, mask[:, None, None, :])
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(mask.dtype).tiny)
    return torch.dropout(weights.to(p.v.dtype), p.dropout, train=p.dropout > 0) @ p.v
