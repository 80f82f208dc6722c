"""Small models of every supported kind, with weights that make the attention of their blocks uneven."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from tokenprune_ext import methods
from tokenprune_ext.patch import TokenState, adapter_of, inspect_host

SIZE = 64
TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": SIZE, "num_classes": 10}
HAS_GATE = "gated" in inspect.signature(Attention).parameters
HAS_SCALE_NORM = "scale_attn_norm" in inspect.signature(VisionTransformer).parameters


def _timm(name: str, **options: object) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")
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

# Depth 3, 16 patches and 24 channels a head, as most that follow: multiplying by 24 ** -0.5 rounds.
_eva = partial(_timm, depth=3, embed_dim=48)
_eva14 = partial(_eva, img_size=56)
EVA: dict[str, Callable[[], nn.Module]] = {
    "eva": partial(_eva14, "eva_giant_patch14_224", mlp_ratio=2),
    "eva02": partial(_eva14, "eva02_base_patch14_224"),
    "eva02_fused": partial(_eva14, "eva02_tiny_patch14_224"),
    "eva02_clip": partial(_eva, "eva02_base_patch16_clip_224"),
    "eva02_post_norm": partial(_eva14, "eva02_enormous_patch14_clip_224", mlp_ratio=2),
    "dinov3": partial(_eva, "vit_small_patch16_dinov3"),
    "dinov3_plus_qkvb": partial(_eva, "vit_small_plus_patch16_dinov3_qkvb"),
    "pe_core": partial(_eva, "vit_pe_core_tiny_patch16_384"),
    "pe_lang": partial(_eva14, "vit_pe_lang_large_patch14_448"),
    "pe_spatial": partial(_eva, "vit_pe_spatial_tiny_patch16_512"),
    "rope_reg1_gap": partial(_eva, "vit_medium_patch16_rope_reg1_gap_256"),
    "rope_axial": partial(_eva, "vit_small_patch16_rope_224"),
    "rope_mixed": partial(_eva, "vit_small_patch16_rope_mixed_224"),
    "rope_mixed_ape": partial(_eva, "vit_small_patch16_rope_mixed_ape_224"),
    "lingbot": partial(_eva, "vit_small_patch16_lingbot"),
    "sapiens2_gqa": partial(_eva, "vit_base_patch16_sapiens2", embed_dim=32, num_heads=4, num_kv_heads=2),
    "eva_dropout": partial(_eva14, "eva02_small_patch14_224", attn_drop_rate=0.2, proj_drop_rate=0.1),
}
BEIT: dict[str, Callable[[], nn.Module]] = {
    "beit": partial(_eva, "beit_base_patch16_224"),
    "beitv2": partial(_eva, "beitv2_base_patch16_224"),
    "beit_token": partial(_eva, "beit_base_patch16_224", global_pool="token"),
    "beit_shared": partial(_eva, "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
}


def _transformers(model: str, config: str, **options: object) -> nn.Module:
    library = pytest.importorskip("transformers", minversion="5.19")
    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"image_size": SIZE, "patch_size": 16}
    if config in ("CLIPConfig", "SiglipConfig"):
        options = {"vision_config": {**size, **options}}
    else:
        options = {**size, **options}
    return getattr(library, model)(getattr(library, config)(num_labels=10, **options))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "hf_vit": partial(_transformers, "ViTForImageClassification", "ViTConfig", hidden_dropout_prob=0.1),
    "hf_vit_bare": partial(_transformers, "ViTModel", "ViTConfig", image_size=(32, 128)),
    "hf_deit": partial(_transformers, "DeiTForImageClassification", "DeiTConfig"),
    "hf_deit_bare": partial(_transformers, "DeiTModel", "DeiTConfig"),
    "hf_deit_teacher": partial(_transformers, "DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "hf_dinov2": partial(_transformers, "Dinov2ForImageClassification", "Dinov2Config", drop_path_rate=0.2),
    "hf_dinov2_bare": partial(_transformers, "Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "hf_dinov2_reg": partial(
        _transformers, "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=3
    ),
    "hf_dinov2_reg_bare": partial(_transformers, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "hf_dinov3_bare": partial(_transformers, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "hf_clip": partial(_transformers, "CLIPForImageClassification", "CLIPConfig", attention_dropout=0.1),
    "hf_clip_bare": partial(_transformers, "CLIPVisionModel", "CLIPVisionConfig"),
    "hf_clip_projection": partial(_transformers, "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "hf_siglip": partial(_transformers, "SiglipForImageClassification", "SiglipConfig"),
    "hf_siglip_bare": partial(_transformers, "SiglipVisionModel", "SiglipVisionConfig"),
}
ALL_HOSTS = {**HOSTS, **EVA, **BEIT, **TRANSFORMERS}


def checkpointed(model: nn.Module, **options: object) -> None:
    """Switch gradient checkpointing on; options are those of torch's function, where the library takes them."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:  # transformers had another name for it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options or None)


def make_host(name: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """The host in eval mode; the same weights at every call. Options go to the model's constructor."""
    model = ALL_HOSTS[name](**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / max(parameter[:1].numel(), 1) ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (parameter != 0))
    return model.to(dtype).eval()


@cache
def shared_host(name: str) -> nn.Module:
    """One host for many tests, which leave it as they found it."""
    return make_host(name)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of images, whatever it wraps it in."""
    output: Any = model(images)
    if isinstance(output, Tensor):
        return output
    return next(output[key] for key in ("logits", "image_embeds", "last_hidden_state") if output.get(key) is not None)


def behind_blocks(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens that leave the last block."""
    seen: list[Tensor] = []
    blocks = adapter_of(model).blocks(model)
    handle = blocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    model(images)
    handle.remove()
    return seen[0]


def tokens_behind_blocks(model: nn.Module, images: Tensor, **options: object) -> list[int]:
    """Token count behind every block. Options go to the model's forward."""
    counts: list[int] = []

    def count(*args: Any) -> None:
        counts.append((args[2].x if isinstance(args[2], TokenState) else args[2]).shape[1])

    hooks = [block.register_forward_hook(count) for block in adapter_of(model).blocks(model)]
    model(images, **options)
    for hook in hooks:
        hook.remove()
    return counts


def set_fused(model: nn.Module, fused: bool) -> None:
    """Whether the blocks use torch's fused attention."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa" if fused else "eager")
    else:
        for block in model.blocks:
            block.attn.fused_attn = fused


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
    images = torch.randn(batch, 3, *inspect_host(model).input_size, generator=torch.Generator().manual_seed(seed))
    return images.to(next(model.parameters()).dtype)


def snapshot(model: nn.Module) -> dict[str, tuple[int, type, dict[str, object]]]:
    """Everything patching could change: identity, class and attributes of every module."""

    def attributes(module: nn.Module) -> dict[str, object]:
        return {
            key: {name: id(part) for name, part in value.items()} if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }

    return {name: (id(module), type(module), attributes(module)) for name, module in model.named_modules()}
