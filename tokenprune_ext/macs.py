"""Multiply-accumulates of a model, dense or pruned, for one image.

1 MAC is what the papers' tables call 1 FLOP. Scoring and selection are left out, as they are there. Blocks are counted
from the shapes of their linear layers, so that a schedule is priced without running anything; patch embedding, pooling
and classifier are counted by torch's own FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .patch import Host, inspect_host


@dataclass(frozen=True)
class BlockCost:
    """What one transformer block costs.

    Attributes:
        attention: weights of the linear layers of the attention (query, key, value, gate, projection).
        width: heads times head dimension.
        mlp: weights of the linear layers of the MLP.
    """

    attention: int
    width: int
    mlp: int

    def macs(self, tokens: int, mlp_tokens: int) -> int:
        """MACs with ``tokens`` tokens (prefix included) in the attention and ``mlp_tokens`` in the MLP.

        For a standard block and one count n this is 12 n C^2 + 2 n^2 C.
        """
        return tokens * self.attention + 2 * tokens**2 * self.width + mlp_tokens * self.mlp


def block_costs(model: nn.Module) -> list[BlockCost]:
    """The cost of every block of a supported model, patched or not."""
    inspect_host(model)
    blocks: Any = model.blocks
    return [BlockCost(_weights(block.attn), block.attn.proj.in_features, _weights(block.mlp)) for block in blocks]


def blocks_macs(
    costs: list[BlockCost], host: Host, keep: Mapping[int, int], where: Literal["attention", "block"]
) -> list[int]:
    """MACs of every block under a schedule.

    Args:
        costs: from :func:`block_costs`.
        host: the model's geometry.
        keep: patch tokens that leave each pruning layer; empty for the dense model.
        where: whether they leave before the MLP or after it.
    """
    result = []
    tokens = host.num_prefix_tokens + host.num_patches
    for layer, cost in enumerate(costs):
        after = host.num_prefix_tokens + keep[layer] if layer in keep else tokens
        result.append(cost.macs(tokens, after if where == "attention" else tokens))
        tokens = after
    return result


def outside_macs(model: nn.Module, num_patches: int) -> int:
    """MACs of everything but the blocks: patch embedding, then pooling and classifier on ``num_patches`` patch tokens.

    Runs those parts on the meta device: no memory, no arithmetic, and the model stays as it is.
    """
    host = inspect_host(model)
    vit: Any = model
    parts = _OutsideBlocks(vit)
    state = {
        name: tensor.detach().to("meta") for name, tensor in chain(parts.named_parameters(), parts.named_buffers())
    }
    first = next(module for module in vit.patch_embed.modules() if isinstance(module, nn.Conv2d))
    images = first.weight.new_empty((1, first.in_channels, *host.input_size), device="meta")
    tokens = first.weight.new_empty((1, host.num_prefix_tokens + num_patches, vit.num_features), device="meta")
    # Fused attention kernels are not all known to the counter; the math backend is matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(parts, state, (images, tokens))
    return counter.get_total_flops() // 2


class _OutsideBlocks(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> None:
        self.model.patch_embed(images)
        self.model.forward_head(tokens)


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
