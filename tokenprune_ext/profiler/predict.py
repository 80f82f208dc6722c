"""The latency of a pruned model against its number of tokens, predicted from the description of a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from tokenprune_ext import methods
from tokenprune_ext.macs import outside_macs
from tokenprune_ext.patch import inspect_host

from .device import Device
from .edges import MIN_FALL, Edge, find_edges
from .products import BlockProducts, Product, block_products
from .waves import Kernel, attention, elementwise_s, linear

FORMAT = 1
SOURCE = "predicted on paper from a description of the device, not measured"


@dataclass(frozen=True)
class Prediction:
    """A staircase on paper: latencies against patch tokens; at the last count nothing is pruned.

    Attributes:
        model: architecture name.
        device: name of the described device.
        dtype: of weights and activations.
        batch_size: images at a time.
        layer: 0-based block that prunes, between its attention and its MLP.
        num_prefix_tokens: tokens in front of the patches, which are never pruned.
        tokens: patch tokens that leave the pruning layer, ascending from 1 to all.
        latency_s: of the whole model, in seconds.
        waves: kernel of a block behind the pruning layer -> its waves at every token count.
        edges: where the latency falls by enough to matter; see :func:`~tokenprune_ext.profiler.edges.find_edges`.
    """

    model: str
    device: str
    dtype: str
    batch_size: int
    layer: int
    num_prefix_tokens: int
    tokens: tuple[int, ...]
    latency_s: tuple[float, ...]
    waves: Mapping[str, tuple[int, ...]]
    edges: tuple[Edge, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the note that nothing was measured."""
        return {"format": FORMAT, "source": SOURCE, **asdict(self)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Prediction:
        """The reverse of :meth:`as_json`. Raises ValueError for anything else."""
        if found.get("format") != FORMAT:
            raise ValueError(f"expected a prediction of format {FORMAT}, got {found.get('format')!r}")
        given = {key: value for key, value in found.items() if key not in ("format", "source")}
        try:
            given["edges"] = tuple(Edge(**{**edge, "kernels": tuple(edge["kernels"])}) for edge in given["edges"])
            given["waves"] = {name: tuple(counts) for name, counts in given["waves"].items()}
            return cls(**{**given, "tokens": tuple(given["tokens"]), "latency_s": tuple(given["latency_s"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a prediction: {error}") from error


def predict(
    model: nn.Module,
    device: Device,
    *,
    batch_size: int = 1,
    dtype: str = "float16",
    layer: int | None = None,
    min_fall: float = MIN_FALL,
) -> Prediction:
    """Latency against the patch tokens that leave one pruning layer.

    Choosing tokens costs nothing here. Blocks in front of the layer, its attention, patch embedding and classifier
    always run with all tokens.

    Args:
        model: a supported model, patched or not; it may be on the meta device.
        device: from :func:`~tokenprune_ext.profiler.device.load_device`.
        batch_size: images at a time.
        dtype: one that the device has a rate for.
        layer: 0-based block that prunes; default: a quarter of the depth, as POMT does.
        min_fall: how much an edge must fall, as a share of the dense latency.

    Raises:
        DeviceError: the device has no rate for the dtype.
        ValueError: no such layer, or a batch of no images.
        UnsupportedModelError: a model that is not understood.
    """
    host = inspect_host(model)
    if layer is None:
        layer = methods.create("pomt").default_layers(host.depth)[0]
    if not 0 <= layer < host.depth:
        raise ValueError(f"layer must be one of the {host.depth} blocks, 0 to {host.depth - 1}; got {layer}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    blocks = block_products(model)
    prefix, dense = host.num_prefix_tokens, host.num_prefix_tokens + host.num_patches
    paper = _Paper(device, dtype, batch_size)
    # Nothing outside the blocks depends on the pruning, so that its time only shifts the staircase.
    fixed = 2 * outside_macs(model, dense) * batch_size / (device.num_sms * device.flop_per_s(dtype))
    fixed += sum(paper.attention_part(block, dense).seconds for block in blocks[: layer + 1])
    fixed += sum(paper.mlp_part(block, dense).seconds for block in blocks[:layer])
    attentions, mlps = Counter(blocks[layer + 1 :]), Counter(blocks[layer:])
    shown = blocks[min(layer + 1, host.depth - 1)]

    tokens = tuple(range(1, host.num_patches + 1))
    latency, kernels = [], []
    for count in tokens:
        parts = [(paper.attention_part(block, prefix + count), times) for block, times in attentions.items()]
        parts += [(paper.mlp_part(block, prefix + count), times) for block, times in mlps.items()]
        latency.append(fixed + sum(part.seconds * times for part, times in parts))
        shown_parts = paper.attention_part(shown, prefix + count), paper.mlp_part(shown, prefix + count)
        kernels.append([kernel for part in shown_parts for kernel in part.kernels])
    edges = [
        replace(edge, kernels=_faster(kernels[edge.tokens - 1], kernels[edge.next - 1]))
        for edge in find_edges(tokens, latency, min_fall)
    ]
    return Prediction(
        model=host.model,
        device=device.name,
        dtype=dtype,
        batch_size=batch_size,
        layer=layer,
        num_prefix_tokens=prefix,
        tokens=tokens,
        latency_s=tuple(latency),
        waves={first.name: tuple(k[i].waves for k in kernels) for i, first in enumerate(kernels[0])},
        edges=tuple(edges),
    )


def _faster(below: list[Kernel], above: list[Kernel]) -> tuple[str, ...]:
    """Names of the kernels that a step makes faster, by more than their memory traffic does."""
    return tuple(a.name for a, b in zip(below, above, strict=True) if a.seconds < 0.98 * b.seconds)


@dataclass(frozen=True)
class _Part:
    seconds: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class _Paper:
    """Halves of a block on a described device."""

    device: Device
    dtype: str
    batch_size: int

    def attention_part(self, block: BlockProducts, tokens: int) -> _Part:
        """Norm, linear layers, attention, residual sum."""
        *before, last = block.attention
        kernels = (
            *(self._linear(product, tokens) for product in before),
            attention(self.device, self.dtype, self.batch_size, block.heads, block.head_dim, tokens),
            self._linear(last, tokens),
        )
        return self._part(kernels, 2, tokens * 5 * block.channels)

    def mlp_part(self, block: BlockProducts, tokens: int) -> _Part:
        """Norm, linear layers, activation, residual sum."""
        kernels = tuple(self._linear(product, tokens) for product in block.mlp)
        between = sum(p.columns + p.inner for p in block.mlp) - 2 * block.channels
        return self._part(kernels, 3, tokens * (5 * block.channels + between))

    def _linear(self, product: Product, tokens: int) -> Kernel:
        return linear(self.device, self.dtype, product.name, self.batch_size * tokens, product.columns, product.inner)

    def _part(self, kernels: tuple[Kernel, ...], others: int, elements: int) -> _Part:
        rest = elementwise_s(self.device, self.dtype, others, self.batch_size * elements)
        return _Part(rest + sum(kernel.seconds for kernel in kernels), kernels)
