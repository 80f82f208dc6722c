"""The calls that are timed: a pruned model at every token count, and single blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune_ext.compare import share
from tokenprune_ext.cuda_graph import cuda_graph
from tokenprune_ext.latency import clock_of
from tokenprune_ext.methods import Method
from tokenprune_ext.patch import Host, HostAdapter, adapter_of, inspect_host
from tokenprune_ext.prune import apply, remove

from .points import BLOCK, MODEL, Point


class ModelTarget:
    """A model on a device, as a ``Target``.

    Args:
        model: a dense model on its device, in its dtype; it is not changed.
        method, layer: what prunes it, and where.
        graph: replay calls as CUDA graphs.
        seed: of the images' pixels, which are normally distributed.

    Raises:
        ValueError: ``graph`` without a CUDA device.
    """

    def __init__(self, model: nn.Module, method: Method, layer: int, *, graph: bool = False, seed: int = 0) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph needs a CUDA device, and the model is on {self.device.type}")
        self.method, self.layer, self.graph, self.seed = method, layer, graph, seed
        self.host, self.adapter = inspect_host(model), adapter_of(model)
        self.dense, self.pruned = model, share(model)
        with self.on_device():
            self.clock = clock_of(self.device.type == "cuda")
        self._inputs: dict[int, Tensor] = {}
        self._entering: dict[tuple[int, int], tuple[Tensor, dict[str, Any]]] = {}

    def on_device(self) -> AbstractContextManager[object]:
        """Makes the model's GPU the current one, where clock and graphs are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def prepare(self, point: Point) -> Callable[[], object]:
        images = self.images(point.batch_size)
        if point.kind == MODEL:
            return self.runnable(partial(self.at(point.tokens), images))
        return self.runnable(self._block(int(point.kind.removeprefix(BLOCK)), images, point.tokens))

    def runnable(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as it is timed: without gradients, as a CUDA graph if that is wanted."""
        if self.graph:
            with torch.inference_mode():
                return cuda_graph(call)
        return torch.inference_mode()(call)

    def at(self, tokens: int) -> nn.Module:
        """The model that keeps so many patch tokens: the dense one for all; valid until the next is asked for."""
        return prune_to(self.pruned, self.method, self.layer, tokens, self.host)

    def images(self, batch_size: int) -> Tensor:
        """Images ``[batch_size, channels, H, W]``, always the same."""
        if batch_size not in self._inputs:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (batch_size, self.host.in_channels, *self.host.input_size)
            self._inputs[batch_size] = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        return self._inputs[batch_size]

    def _block(self, index: int, images: Tensor, tokens: int) -> Callable[[], object]:
        key = (index, len(images))
        if key not in self._entering:
            self._entering[key] = _entering(self.dense, self.adapter, index, images)
        x, call = self._entering[key]
        x = x[:, : self.host.num_prefix_tokens + tokens].contiguous()
        return partial(_run_block, self.adapter, self.adapter.blocks(self.dense)[index], self.host, x, call)


def prune_to(model: nn.Module, method: Method, layer: int, tokens: int, host: Host) -> nn.Module:
    """The model, changed in place to keep so many patch tokens from a layer on; dense when those are all."""
    if tokens == host.num_patches:
        return remove(model)
    return apply(model, method, layers=(layer,), keep=[tokens])


def block_kinds(model: nn.Module) -> tuple[str, ...]:
    """For every block, the kind of point that measures it; blocks of equal class and shapes share one."""
    first: dict[Any, str] = {}
    kinds = []
    for index, block in enumerate(adapter_of(model).blocks(model)):
        shapes = (type(block), tuple((name, tensor.shape) for name, tensor in block.named_parameters()))
        kinds.append(first.setdefault(shapes, f"{BLOCK} {index}"))
    return tuple(kinds)


def _entering(model: nn.Module, adapter: HostAdapter, index: int, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The tokens that enter a block of the dense model, and what the model hands to it beside them."""
    with torch.inference_mode(), _caught(adapter.blocks(model)[index]) as found:
        model(images)
    (x, *args), kwargs = found[-1]
    return x, adapter.call_arguments(*args, **kwargs)


@contextmanager
def _caught(block: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """The arguments of every call of a block inside."""
    found: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _run_block(adapter: HostAdapter, block: nn.Module, host: Host, x: Tensor, call: dict[str, Any]) -> Tensor:
    """A block as it runs in a pruned model; the tokens that are left are the first ones."""
    position = None
    patches = x.shape[1] - host.num_prefix_tokens
    if host.positional and patches < host.num_patches:
        position = torch.arange(patches, device=x.device).expand(len(x), -1)
    projected = adapter.project(block, x, x.shape[1], position, **call)
    return adapter.add_mlp(block, adapter.add_attention(block, x, adapter.attend(block, projected, None)))
