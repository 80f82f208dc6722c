"""A block that removes nothing is the dense block, on every host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from host_models import HOSTS, images_for, make_host
from timm.models.vision_transformer import Block

from tokenprune_ext import methods
from tokenprune_ext.patch import PrunedBlock, PruningStep, Reduced, inspect_host, install
from tokenprune_ext.prune import apply, describe, remove

METHODS = ("pomt", "random", "topk", "zero_tprune")


@dataclass(frozen=True)
class KeepEverything:
    """Hands its tokens through."""

    where: str

    def reduce(self, x, ctx, keep):
        tokens = torch.arange(ctx.num_prefix, x.shape[1]).expand(x.shape[0], -1)
        return Reduced(x, tokens, False)


def prune_everywhere(model, method):
    host = inspect_host(model)
    steps = {layer: PruningStep(method, layer, host.num_patches, host.num_patches, host) for layer in range(host.depth)}
    install(model, steps, "record")
    assert all(type(block) is PrunedBlock for block in model.blocks)


@pytest.mark.parametrize("where", ["attention", "block"])
@pytest.mark.parametrize("mode", ["eval", "train", "unfused", "unfused train", "bfloat16"])
@pytest.mark.parametrize("name", HOSTS)
def test_block_is_bit_identical(name, mode, where):
    model = make_host(name, torch.bfloat16 if mode == "bfloat16" else torch.float32).train("train" in mode)
    for block in model.blocks:
        block.attn.fused_attn = "unfused" not in mode
    images = images_for(model)
    torch.manual_seed(1)
    dense = model.forward_features(images)
    prune_everywhere(model, KeepEverything(where))
    torch.manual_seed(1)
    assert torch.equal(model.forward_features(images), dense)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_keep_all_is_the_dense_model(name, method):
    model = make_host(name)
    images = images_for(model)
    dense = model(images)
    apply(model, method, keep=1.0)
    assert all(type(block) is Block for block in model.blocks)
    assert torch.equal(model(images), dense)
    assert "pruning nothing" in str(describe(model))
    assert model.forward_intermediates(images)  # still the dense model in every other way
    assert not hasattr(remove(model), "_tokenprune_record")


@dataclass(frozen=True)
class ZeroTPruneAttention(methods.ZeroTPrune):
    where: ClassVar[str] = "attention"


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", [*(methods.create(name) for name in METHODS), ZeroTPruneAttention()], ids=repr)
def test_forced_reduction_to_all_tokens(name, method):
    model = make_host(name, torch.float64)
    images = images_for(model)
    dense = model(images)
    prune_everywhere(model, method)
    pruned = model(images)
    assert (pruned - dense).abs().max() <= 1e-6 * dense.abs().max()
