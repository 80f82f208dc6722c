"""Models that look like hosts and are none: refused by name, with what is supported, before anything is changed."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from host_models import make_host, snapshot
from torch import nn

from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply


def changed(name, change):
    model = make_host(name)
    change(model)
    return model


def hook(model):
    model.blocks[1].attn.register_forward_pre_hook(lambda *args: None)


def add_part(model):
    model.blocks[1].attn.lora = nn.Linear(2, 2)


def add_parameter(model):
    model.blocks[1].register_parameter("gamma_3", nn.Parameter(torch.ones(32)))


def separate(model):
    model.blocks[1].attn.qkv_bias_separate = True


def truncate(model):
    model.blocks = nn.Sequential(*model.blocks)


def replace_block(model):
    model.blocks[1] = make_host("vit").blocks[1]


OTHER_MODELS = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_atto": "ConvNeXt",
    "naflexvit_base_patch16_gap": "NaFlexVit",
    "samvit_base_patch16": "VisionTransformerSAM",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "hiera_tiny_224": "Hiera",
    "maxvit_tiny_tf_224": "MaxxVit",
    "cait_xxs24_224": "Cait",
    "xcit_nano_12_p16_224": "Xcit",
    "pvt_v2_b0": "PyramidVisionTransformerV2",
}
OTHER_BLOCKS = {
    "vit_base_patch16_xp_224": r"blocks\.0 .*ParallelScalingBlock",
    "vit_small_patch16_18x2_224": r"blocks\.0 .*ParallelThingsBlock",
    "vit_dlittle_patch16_reg1_gap_256": r"blocks\.0\.attn .*DiffAttention",
    "vit_small_r26_s32_224": None,  # a hybrid is a VisionTransformer behind a ResNet
}
CHANGED = {
    "eva, patch dropout": (partial(make_host, "eva02", patch_drop_rate=0.2), "patch_drop is not .*patch_drop_rate=0"),
    "eva, hooks": (partial(changed, "eva02", hook), "block 1 is not supported: its attn has forward hooks"),
    "eva, unknown part": (partial(changed, "eva02", add_part), r"blocks\.1\.attn is not .*unknown parts \['lora'\]"),
    "eva, unknown parameter": (partial(changed, "dinov3", add_parameter), r"blocks\.1 is not .*\['gamma_3'\]"),
    "eva, separate bias": (partial(changed, "eva02_fused", separate), r"blocks\.1\.attn is not .*qkv_bias_separate"),
    "eva, Sequential": (partial(changed, "eva02", truncate), "blocks is not .*expected a ModuleList of distinct"),
    "beit, separate bias": (partial(changed, "beit", separate), r"blocks\.1\.attn is not .*qkv_bias_separate"),
    "beit, another block": (partial(changed, "beit", replace_block), r"blocks\.1 is not .*vision_transformer\.Block"),
}


def on_meta(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models(name):
    model = on_meta(name)
    with pytest.raises(UnsupportedModelError, match=rf"\.{OTHER_MODELS[name]} is not supported\. Supported: timm Vis"):
        apply(model, "topk", layers=[1], keep=0.5)


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_other_blocks(name):
    model = on_meta(name)
    if OTHER_BLOCKS[name] is None:
        apply(model, "topk", layers=[1], keep=0.5)
        return
    with pytest.raises(UnsupportedModelError, match=rf"{OTHER_BLOCKS[name]}.* Supported: timm VisionTransformer"):
        apply(model, "topk", layers=[1], keep=0.5)


@pytest.mark.parametrize("case", CHANGED)
def test_changed_models(case):
    make, message = CHANGED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        apply(model, "topk", layers=[1], keep=0.5)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["eva02", "rope_mixed"])
def test_masks(name):
    model = apply(make_host(name), "topk", layers=[1], keep=0.5)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    for mask in ({"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask and is_causal do not work on a pruned model"):
            model(images, **mask)
