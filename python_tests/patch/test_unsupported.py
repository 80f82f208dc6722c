"""Models that are not understood are refused by the name of what is unknown, before anything is changed."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from host_models import TINY, snapshot
from timm.layers import Mlp
from timm.models import vision_transformer as vit
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply


class OwnViT(VisionTransformer):
    """Could do anything in its forward."""


class OwnAttention(Attention):
    """As could this."""


def vit_with(change=lambda model: None, **options):
    model = VisionTransformer(patch_size=16, **{**TINY, **options})
    change(model)
    return model


def replace(path, make):
    """A change of one submodule of a model."""

    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make())

    return change


def double_last_block(model):
    model.blocks[3] = model.blocks[2]


def own_forward(model):
    model.blocks[1].forward = lambda x: x


def own_attention_forward(model):
    model.blocks[1].attn.forward = lambda x: x


def own_intermediates(model):
    model.forward_intermediates = lambda x: x


def hook_attention(model):
    model.blocks[1].attn.register_forward_hook(lambda *args: None)


UNSUPPORTED_MODELS = {
    "not a ViT": (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear is not supported"),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
        "SwinTransformer is not supported",
    ),
    "subclass": (lambda: OwnViT(patch_size=16, **TINY), "OwnViT is not supported"),
    "compiled": (lambda: torch.compile(vit_with()), "OptimizedModule is not supported; patch the model before"),
}
UNSUPPORTED_PARTS = {
    "ParallelScalingBlock": (
        partial(vit_with, block_fn=vit.ParallelScalingBlock),
        "blocks.0 is not supported: .*ParallelScalingBlock",
    ),
    "ParallelThingsBlock": (
        partial(vit_with, block_fn=vit.ParallelThingsBlock),
        "blocks.0 is not supported: .*ParallelThingsBlock",
    ),
    "one other block": (partial(vit_with, replace("blocks.2", nn.Identity)), "blocks.2 is not supported: .*Identity"),
    "compiled block": (
        partial(vit_with, lambda model: replace("blocks.2", partial(torch.compile, model.blocks[2]))(model)),
        "blocks.2 is not supported: .*OptimizedModule",
    ),
    "attention subclass": (
        partial(vit_with, replace("blocks.3.attn", partial(OwnAttention, 32, 2))),
        "blocks.3.attn is not supported: .*OwnAttention",
    ),
    "unknown part": (
        partial(vit_with, replace("blocks.1.attn.rope", nn.Identity)),
        r"blocks.1.attn is not supported: unknown parts \['rope'\]",
    ),
    "unknown parameter": (
        partial(vit_with, replace("blocks.1.attn.sink", lambda: nn.Parameter(torch.zeros(2)))),
        r"blocks.1.attn is not supported: unknown parts \['sink'\]",
    ),
    "unknown block part": (
        partial(vit_with, replace("blocks.0.adapter", lambda: Mlp(32))),
        r"blocks.0 is not supported: unknown parts \['adapter'\]",
    ),
    "missing part": (
        partial(vit_with, lambda model: delattr(model.blocks[0], "ls1")),
        r"missing parts \['ls1'\]",
    ),
    "blocks in a list": (partial(vit_with, replace("blocks", nn.ModuleList)), "blocks is not supported: .*ModuleList"),
    "one block twice": (partial(vit_with, double_last_block), "distinct blocks"),
    "patch dropout": (partial(vit_with, patch_drop_rate=0.3), "patch_drop is not supported: .*patch_drop_rate=0"),
    "forward replaced": (partial(vit_with, own_forward), "blocks.1 is not supported: its forward was replaced"),
    "attention forward replaced": (
        partial(vit_with, own_attention_forward),
        "blocks.1.attn is not supported: its forward was replaced",
    ),
    "intermediates replaced": (partial(vit_with, own_intermediates), "forward_intermediates is not supported"),
    "hooked attention": (partial(vit_with, hook_attention), "block 1 is not supported: its attn has forward hooks"),
}
if hasattr(vit, "DiffAttention"):
    UNSUPPORTED_PARTS["DiffAttention"] = (
        partial(vit_with, attn_layer="diff"),
        "blocks.0.attn is not supported: .*DiffAttention",
    )


@pytest.mark.parametrize("case", [*UNSUPPORTED_MODELS, *UNSUPPORTED_PARTS])
def test_unsupported_models_are_refused_by_name(case):
    make, message = {**UNSUPPORTED_MODELS, **UNSUPPORTED_PARTS}[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        apply(model, "topk", layers=[1, 2], keep=0.5)
    assert case in UNSUPPORTED_PARTS or "Supported: timm VisionTransformer" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert snapshot(model) == before


def test_no_fixed_image_size():
    model = vit_with()
    model.patch_embed.img_size = model.patch_embed.num_patches = None
    with pytest.raises(UnsupportedModelError, match="patch_embed is not supported: built without an image size"):
        apply(model, "topk", keep=0.5)
