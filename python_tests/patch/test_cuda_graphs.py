"""Pruned models can be captured as CUDA graphs.

Without a GPU: traced on fake CUDA tensors, nothing asks for a value (FakeTensor refuses) and nothing touches the CPU.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from host_models import PRUNING, images_for, logits, make_host
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune_ext import methods
from tokenprune_ext.cuda_graph import cuda_graph
from tokenprune_ext.methods.random import Random
from tokenprune_ext.prune import apply

CASES = [("vit", method) for method in PRUNING]
CASES += [
    (name, "zero_tprune") for name in ("siglip", "dinov2_reg4", "eva02", "rope_mixed", "beit", "hf_vit", "hf_clip")
]
CASES += [("hf_dinov3_bare", "auto")]


class Elsewhere(TorchDispatchMode):
    """Collects the operators that have a tensor off the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.found.append(str(function))
        return result


def off_the_gpu(model: nn.Module) -> list[str]:
    """Operators of a forward, on fake CUDA tensors, that are not on the GPU alone."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        known = {
            id(tensor): torch.empty_like(fake.from_tensor(tensor), device="cuda")
            for tensor in chain(model.parameters(), model.buffers())
        }
        twin, images = copy.deepcopy(model, known), torch.empty_like(images_for(model, 3), device="cuda")
        with Elsewhere() as watch:
            assert logits(twin, images).device.type == "cuda"
    return watch.found


@pytest.mark.parametrize(("name", "method"), CASES)
def test_nothing_waits_for_the_device(name, method):
    assert off_the_gpu(apply(make_host(name), method, layers=[0, 1], keep=0.7)) == []


@dataclass(frozen=True, kw_only=True)
class Reads(Random):
    """A method that asks for a value."""

    name: ClassVar[str] = "reads"

    def scores(self, ctx):
        return super().scores(ctx) * ctx.x.sum().item()


@dataclass(frozen=True, kw_only=True)
class Copies(Random):
    """A method that moves a tensor from the CPU."""

    name: ClassVar[str] = "copies"

    def scores(self, ctx):
        return super().scores(ctx) * torch.ones(ctx.x.shape[1]).to(ctx.x.device)


def test_a_method_that_waits_is_found(monkeypatch):
    for method in (Reads, Copies):
        monkeypatch.setitem(methods.base._registry, method.name, method)
    with pytest.raises(DataDependentOutputException):
        off_the_gpu(apply(make_host("vit"), Reads(), keep=0.7))
    assert "aten._to_copy.default" in off_the_gpu(apply(make_host("vit"), Copies(), keep=0.7))


def test_adapters_neither_wait_nor_allocate_themselves():
    folder = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
    sources = [*folder.glob("*.cu"), *folder.glob("*.cpp"), *folder.glob("*.h"), *folder.glob("kernels/*.cuh")]
    if not sources:
        pytest.skip("no source tree")
    for source in sources:
        text = source.read_text()
        for call in ("Synchronize", "cudaMalloc", "cudaFree", "cudaMemcpy", "cudaMemset", "legacy"):
            assert call not in text.replace("__syncthreads", ""), f"{call} in {source.name}"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing captured as a CUDA graph")


@needs_gpu
def test_replay_of_every_operator(bench):
    calls = importlib.import_module("operator_calls").operator_calls("cuda")
    for name, arguments in calls.items():
        operator = getattr(torch.ops.tokenprune, name)
        replay = cuda_graph(lambda operator=operator, arguments=arguments: operator(*arguments))
        torch.testing.assert_close(replay(), operator(*arguments), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("method", methods.available())
def test_replay_gives_what_a_call_gives(method):
    model = make_host("vit").cuda()
    if method != "dense":
        apply(model, method, layers=[0, 1], keep=0.7)
    images = images_for(model, 3).cuda()
    with torch.no_grad():
        replay = cuda_graph(lambda: model(images))
        for seed in (1, 2):
            images.copy_(images_for(model, 3, seed))
            assert torch.equal(replay(), model(images))
