"""The matrix products of a block, read off a run on the meta device: any supported host, no memory, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tokenprune_ext.macs import of_blocks
from tokenprune_ext.patch import HostAdapter

_TOKENS = 3  # any number that is no width of a model
_LINEAR = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}  # and which argument is the left factor


@dataclass(frozen=True)
class Product:
    """One linear layer: ``tokens x inner`` times ``inner x columns``.

    Attributes:
        name: path of its weight in the block, like ``attn.qkv``.
        columns: outputs of a token.
        inner: inputs of a token.
    """

    name: str
    columns: int
    inner: int


@dataclass(frozen=True)
class BlockProducts:
    """What a block multiplies, in order.

    Attributes:
        attention: linear layers up to the residual sum behind the attention.
        mlp: linear layers behind it.
        channels: width of the residual stream.
        heads: attention heads.
        head_dim: channels of one head.
    """

    attention: tuple[Product, ...]
    mlp: tuple[Product, ...]
    channels: int
    heads: int
    head_dim: int


def block_products(model: nn.Module) -> list[BlockProducts]:
    """The matrix products of every block of a supported model, patched or not; it may be on the meta device."""
    return of_blocks(model, _products)


class _Recorder(TorchDispatchMode):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # A view of a weight shares its storage, which tells the layer.
        self.names = {_storage(weight): name.removesuffix(".weight") for name, weight in block.named_parameters()}
        self.found: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _LINEAR.get(func.overloadpacket)
        if place is not None:
            left, right = args[place : place + 2]
            assert left.shape[0] == _TOKENS, f"a product of {left.shape[0]} rows for {_TOKENS} tokens"
            name = self.names.get(_storage(right), f"product {len(self.found)}")
            self.found.append(Product(name, right.shape[1], right.shape[0]))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _products(adapter: HostAdapter, channels: int, block: nn.Module) -> BlockProducts:
    dtype = next(parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())
    x = torch.empty((1, _TOKENS, channels), device="meta", dtype=dtype)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Recorder(block) as recorder:
        projected = adapter.project(block, x, _TOKENS, None)
        x = adapter.add_attention(block, x, projected.q)
        behind_attention = len(recorder.found)
        adapter.add_mlp(block, x)
    return BlockProducts(
        attention=tuple(recorder.found[:behind_attention]),
        mlp=tuple(recorder.found[behind_attention:]),
        channels=channels,
        heads=projected.q.shape[1],
        head_dim=projected.q.shape[3],
    )
