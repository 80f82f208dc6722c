"""Multiply-accumulates of a model, dense or pruned, for one image.

1 MAC is what the papers' tables call 1 FLOP. What is counted is counted by torch's own FlopCounterMode, on the meta
device: no memory, no arithmetic, and the model stays as it is. Each part of a block is run twice at different token
counts, which gives its price a token; a schedule is then priced without running anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .methods import Dense, Method
from .patch import Host, HostAdapter, Projected, adapter_of, inspect_host

Found = TypeVar("Found")


@dataclass(frozen=True)
class BlockCost:
    """What one transformer block costs, in MACs a token unless it says otherwise.

    Attributes:
        query: projection to queries, for a token that asks.
        key_value: projection to keys and values.
        output: projection of the attention's output, for a token that asks.
        mlp: the MLP.
        channels: width of the residual stream.
        heads: attention heads.
        head_dim: channels of one head; attention costs ``2 * heads * head_dim`` a pair of query and key.
    """

    query: int
    key_value: int
    output: int
    mlp: int
    channels: int
    heads: int
    head_dim: int

    def macs(self, tokens: int, mlp_tokens: int, queries: int | None = None) -> int:
        """MACs with ``tokens`` tokens (prefix included) in the attention and ``mlp_tokens`` in the MLP.

        For a standard block and one count n this is 12 n C^2 + 2 n^2 C. With ``queries``, only so many tokens ask.
        """
        asking = tokens if queries is None else queries
        attention = asking * (self.query + self.output + 2 * tokens * self.heads * self.head_dim)
        return attention + tokens * self.key_value + mlp_tokens * self.mlp


def block_costs(model: nn.Module) -> list[BlockCost]:
    """The cost of every block of a supported model, patched or not."""
    return of_blocks(model, _block_cost)


def of_blocks(model: nn.Module, ask: Callable[[HostAdapter, int, nn.Module], Found]) -> list[Found]:
    """What ``ask(adapter, channels, block)`` finds of every block, on the meta device; equal blocks are asked once."""
    host, adapter = inspect_host(model), adapter_of(model)
    known: dict[Any, Found] = {}
    found = []
    for block in map(_on_meta, adapter.blocks(model)):
        shapes = tuple((name, tensor.shape) for name, tensor in _tensors(block))
        if shapes not in known:
            known[shapes] = ask(adapter, host.channels, block)
        found.append(known[shapes])
    return found


def blocks_macs(costs: list[BlockCost], host: Host, keep: Mapping[int, int], method: Method) -> list[tuple[int, int]]:
    """MACs of every block under a schedule, and of choosing the tokens that leave it.

    Args:
        costs: from :func:`block_costs`.
        host: the model's geometry.
        keep: patch tokens that leave each pruning layer; empty for none.
        method: says where tokens leave, what scoring costs, and how much of the last block is computed.
    """
    result = []
    tokens = host.num_prefix_tokens + host.num_patches
    for layer, cost in enumerate(costs):
        if method.class_token_only and layer == host.depth - 1:
            assert host.head_tokens is not None
            result.append((cost.macs(tokens, host.head_tokens, host.head_tokens), 0))
            continue
        after = host.num_prefix_tokens + keep[layer] if layer in keep else tokens
        scoring = method.scoring_macs(cost, host, layer, tokens, keep[layer]) if after < tokens else 0
        result.append((cost.macs(tokens, after if method.where == "attention" else tokens), scoring))
        tokens = after
    return result


class MacsShare:
    """What a schedule costs: MACs of a model's blocks, over those of the dense blocks.

    Args:
        model: the model, patched or not.
        scoring: charge choosing and merging; the papers' tables do not.
    """

    def __init__(self, model: nn.Module, *, scoring: bool = True) -> None:
        self._scoring = scoring
        self._costs, self._host = block_costs(model), inspect_host(model)
        self._dense = self._total({}, Dense())

    def __call__(self, keep: Mapping[int, int], method: Method) -> float:
        """The share under these keep counts (block -> patch tokens that leave it)."""
        return self._total(keep, method) / self._dense

    def _total(self, keep: Mapping[int, int], method: Method) -> int:
        blocks = blocks_macs(self._costs, self._host, keep, method)
        return sum(macs + scoring * self._scoring for macs, scoring in blocks)


def outside_macs(model: nn.Module, tokens: int) -> int:
    """MACs of everything but the blocks, with ``tokens`` tokens (prefix included) behind them."""
    host, adapter = inspect_host(model), adapter_of(model)
    dense = _on_meta(model)
    for block in adapter.blocks(dense):
        block.forward = lambda x, *args, **kwargs: x[:, :tokens]
    dtype = next(dense.parameters()).dtype
    images = torch.empty((1, host.in_channels, *host.input_size), device="meta", dtype=dtype)
    return _count(lambda: dense(images))


def _block_cost(adapter: HostAdapter, channels: int, block: nn.Module) -> BlockCost:
    dtype = next(tensor.dtype for _, tensor in _tensors(block) if tensor.is_floating_point())

    def project(tokens: int, queries: int) -> Callable[[], Projected]:
        x = torch.empty((1, tokens, channels), device="meta", dtype=dtype)
        return lambda: adapter.project(block, x, queries, None)

    one = torch.empty((1, 1, channels), device="meta", dtype=dtype)
    q = project(1, 1)().q
    both = _count(project(3, 1))
    return BlockCost(
        query=_count(project(3, 2)) - both,
        key_value=both - _count(project(2, 1)),
        output=_count(lambda: adapter.add_attention(block, one, q)),
        mlp=_count(lambda: adapter.add_mlp(block, one)),
        channels=channels,
        heads=q.shape[1],
        head_dim=q.shape[3],
    )


def _count(run: Callable[[], object]) -> int:
    # Fused attention kernels are not all known to the counter; the math backend is matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and dtypes alone; quantised layers become the float ones they stand for."""
    memo: dict[int, Any] = {
        id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for _, tensor in _tensors(module)
    }
    part: Any
    for part in module.modules():
        if type(part).__module__.startswith("torch.ao.nn.quantized") and hasattr(part, "in_features"):
            plain = nn.Linear(part.in_features, part.out_features, device="meta", dtype=torch.float32)
            memo[id(part)] = plain.requires_grad_(False)
    return copy.deepcopy(module, memo)
