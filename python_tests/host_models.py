"""Small models of every supported kind, with weights that make the attention of their blocks uneven."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from tokenprune_ext import methods
from tokenprune_ext.patch import inspect_host

SIZE = 64
TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": SIZE, "num_classes": 10}
HAS_GATE = "gated" in inspect.signature(Attention).parameters
HAS_SCALE_NORM = "scale_attn_norm" in inspect.signature(VisionTransformer).parameters


def _timm(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, **{**TINY, **options})


def _plain(**options: object) -> nn.Module:
    return VisionTransformer(patch_size=16, **{**TINY, **options})


def _gated() -> nn.Module:
    model = _plain()
    for block in model.blocks:
        block.attn = Attention(32, num_heads=2, qkv_bias=True, gated=True)
    return model


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(_timm, "vit_tiny_patch16_224"),
    "augreg": partial(_timm, "vit_small_patch32_224.augreg_in21k_ft_in1k", img_size=128),
    "deit": partial(_timm, "deit_tiny_patch16_224"),
    "deit_distilled": partial(_timm, "deit_tiny_distilled_patch16_224"),
    "deit3": partial(_timm, "deit3_small_patch16_224"),
    "dinov2": partial(_timm, "vit_small_patch14_dinov2", img_size=56),
    "dinov2_reg4": partial(_timm, "vit_small_patch14_reg4_dinov2", img_size=56),
    "dinov2_swiglu": partial(_timm, "vit_giant_patch14_dinov2", img_size=56),
    "siglip": partial(_timm, "vit_base_patch16_siglip_224"),
    "siglip_gap": partial(_timm, "vit_base_patch16_siglip_gap_224"),
    "reg4_gap": partial(_timm, "vit_medium_patch16_reg4_gap_256"),
    "clip": partial(_timm, "vit_base_patch16_clip_224"),
    "qk_norm": partial(_plain, qk_norm=True),
    "dropout": partial(_plain, attn_drop_rate=0.2, proj_drop_rate=0.1, drop_path_rate=0.3),
}
if HAS_SCALE_NORM:
    HOSTS["scale_norm"] = partial(_plain, scale_attn_norm=True, scale_mlp_norm=True)
if HAS_GATE:
    HOSTS["gated"] = _gated


def make_host(name: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """The host in eval mode; the same weights at every call. Options go to the model's constructor."""
    model = HOSTS[name](**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (parameter != 0))
    return model.to(dtype).eval()


# Methods that remove tokens, by name.
PRUNING = tuple(name for name in methods.available() if name != "dense")


def skip_unsuited(method: str, model: nn.Module) -> None:
    """Leave the test when the method refuses the model; that it does so by name is another test's business."""
    try:
        methods.create(method).check_host(inspect_host(model))
    except ValueError as error:
        pytest.skip(str(error))


def images_for(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    """Random images of the model's size and dtype."""
    height, width = model.patch_embed.img_size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return images.to(next(model.parameters()).dtype)


def snapshot(model: nn.Module) -> dict[str, tuple[int, type, dict[str, object]]]:
    """Everything patching could change: identity, class and attributes of every module."""

    def attributes(module: nn.Module) -> dict[str, object]:
        return {
            key: {name: id(part) for name, part in value.items()} if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }

    return {name: (id(module), type(module), attributes(module)) for name, module in model.named_modules()}
