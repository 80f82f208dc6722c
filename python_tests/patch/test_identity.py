"""A block that removes nothing is the dense block, on every host."""

from __future__ import annotations

import pytest
import torch
from host_models import (
    ALL_HOSTS,
    HOSTS,
    PRUNING,
    behind_blocks,
    images_for,
    logits,
    make_host,
    set_fused,
    skip_unsuited,
)
from timm.models.vision_transformer import Block

from tokenprune_ext import methods
from tokenprune_ext.patch import BlockPlan, PrunedBlock, adapter_of, inspect_host, install
from tokenprune_ext.prune import apply, describe, remove, schedule_of


def patch_everywhere(model):
    """Every block runs taken apart, and prunes nothing."""
    host = inspect_host(model)
    n = host.num_patches
    plans = {
        layer: BlockPlan(adapter_of(model), host, methods.create("topk"), layer, n, n) for layer in range(host.depth)
    }
    install(model, plans, "record")
    assert all(isinstance(block, PrunedBlock) for block in adapter_of(model).blocks(model))


@pytest.mark.parametrize("mode", ["eval", "train", "unfused", "unfused train", "bfloat16", "unfused bfloat16"])
@pytest.mark.parametrize("name", ALL_HOSTS)
def test_block_is_bit_identical(name, mode):
    model = make_host(name, torch.bfloat16 if "bfloat16" in mode else torch.float32).train("train" in mode)
    set_fused(model, "unfused" not in mode)
    images = images_for(model)
    with torch.set_grad_enabled("train" in mode):
        torch.manual_seed(1)
        dense = behind_blocks(model, images)
        patch_everywhere(model)
        torch.manual_seed(1)
        assert torch.equal(behind_blocks(model, images), dense)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", PRUNING)
def test_keep_all_is_the_dense_model(name, method):
    model = make_host(name)
    skip_unsuited(method, model)
    images = images_for(model)
    dense = model(images)
    apply(model, method, keep=1.0)
    if not schedule_of(model).build_method().class_token_only:
        assert all(type(block) is Block for block in model.blocks)
        assert torch.equal(model(images), dense)
        assert model.forward_intermediates(images)  # still the dense model in every other way
    torch.testing.assert_close(model(images), dense, rtol=1e-4, atol=1e-4)
    assert "pruning nothing" in str(describe(model))
    assert not hasattr(remove(model), "_tokenprune_record")


@pytest.mark.parametrize("name", ALL_HOSTS)
def test_class_token_only_is_exact(name):
    """The last block computes what the classifier reads, and what it reads is unchanged."""
    model = make_host(name, torch.float64)
    images = images_for(model)
    dense = logits(model, images)
    only = methods.create("dense", class_token_only=True)
    if inspect_host(model).head_tokens is None:
        with pytest.raises(ValueError, match="reads the patch tokens too"):
            apply(model, only)
        assert torch.equal(logits(model, images), dense)
        return
    apply(model, only)
    assert behind_blocks(model, images).shape[1] == inspect_host(model).head_tokens
    torch.testing.assert_close(logits(model, images), dense)
    assert describe(model).blocks_macs < describe(model).dense_blocks_macs
    assert torch.equal(logits(remove(model), images), dense)
