"""What is timed is what runs: pruned models, and blocks of every family of models."""

from __future__ import annotations

import pytest
import timm
import torch
from host_models import make_host

import tokenprune_ext as tokenprune
from tokenprune_ext.profiler.models import ModelTarget, block_kinds
from tokenprune_ext.profiler.points import MODEL, Point

HOSTS = ("vit", "dinov2_reg4", "eva02", "rope_mixed", "beit", "beit_shared", "hf_vit_bare", "hf_dinov3_bare")


def test_the_pruned_model_is_timed() -> None:
    model = make_host("vit")
    target = ModelTarget(model, tokenprune.methods.create("pomt"), 1)
    images = target.images(2)
    pruned = tokenprune.apply(make_host("vit"), "pomt", layers=(1,), keep=[9])
    with torch.inference_mode():
        assert torch.equal(target.prepare(Point(MODEL, 2, 9))(), pruned(images))  # type: ignore[arg-type]
        assert torch.equal(target.prepare(Point(MODEL, 2, 16))(), model(images))  # type: ignore[arg-type]
    assert torch.equal(images, ModelTarget(model, tokenprune.methods.create("pomt"), 1).images(2))
    with pytest.raises(ValueError, match="not pruned"):
        tokenprune.schedule_of(model)


@pytest.mark.parametrize("name", HOSTS)
def test_a_block_is_timed_as_it_runs(name: str) -> None:
    model = make_host(name)
    target = ModelTarget(model, tokenprune.methods.Dense(), 0)
    seen: list[object] = []
    block = target.adapter.blocks(model)[1]
    handle = block.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.inference_mode():
        model(target.images(2))
    handle.remove()
    whole = target.prepare(Point("block 1", 2, target.host.num_patches))()
    torch.testing.assert_close(whole, seen[0])
    fewer = target.prepare(Point("block 1", 2, 5))()
    assert isinstance(fewer, torch.Tensor)
    assert fewer.shape == (2, target.host.num_prefix_tokens + 5, target.host.channels)
    assert not fewer.requires_grad
    assert not block._forward_pre_hooks


def test_blocks_of_equal_shapes_share_a_kind() -> None:
    model = make_host("vit")
    assert block_kinds(model) == ("block 0",) * 4
    model.blocks[2].mlp = timm.layers.Mlp(32, 96)
    assert block_kinds(model) == ("block 0", "block 0", "block 2", "block 0")
