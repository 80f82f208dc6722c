"""The demo model: a small timm vision transformer and its packaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .images import CLASSES, GRID, IMAGE_SIZE, PATCH_SIZE

__all__ = ["WEIGHTS_PATH", "DenselyTaught", "create_model", "initialise", "load_model", "vit_demo"]

#: The packaged weights: float16, safetensors.
WEIGHTS_PATH: Final = Path(__file__).with_name("vit_demo.safetensors")

_CONFIG: Final[Mapping[str, Any]] = {
    "architecture": "vit_demo",
    "url": "",
    "license": "apache-2.0",
    "num_classes": len(CLASSES),
    "label_names": CLASSES,
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}

_OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm.create_model tells every constructor


def create_model(dim: int = 64, depth: int = 12, heads: int = 2) -> VisionTransformer:
    """An untrained demo model in training mode; the defaults fit the packaged weights.

    The model takes float images ``[N, 3, 112, 112]`` with values in [-1, 1] and returns logits
    ``[N, 10]``. It has a class token, which it pools by, and 14 x 14 patch tokens. Its ``pretrained_cfg``
    gives the preprocessing that ``timm.data.resolve_model_data_config`` reads.

    Args:
        dim: Token width, a positive multiple of ``heads``.
        depth: Number of blocks, at least 1.
        heads: Attention heads of a block, at least 1.

    Raises:
        ValueError: If an argument lies outside the values above.
    """
    for name, value in (("dim", dim), ("depth", depth), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if dim % heads:
        raise ValueError(f"dim is {dim}; it must be a multiple of heads, {heads}")
    return vit_demo(embed_dim=dim, depth=depth, num_heads=heads)


@register_model
def vit_demo(pretrained: bool = False, **arguments: Any) -> VisionTransformer:
    """The demo model for ``timm.create_model("vit_demo")``, untrained; :func:`load_model` has the weights.

    Args:
        pretrained: timm's; must be False.
        arguments: of timm's VisionTransformer, in place of the demo model's.

    Raises:
        ValueError: pretrained.
    """
    if pretrained:
        raise ValueError("the weights of vit_demo are in the package: tokenprune_ext.demo.load_model()")
    shape = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_classes": len(CLASSES), "global_pool": "token"}
    size = {"embed_dim": 64, "depth": 12, "num_heads": 2}
    given = {name: value for name, value in arguments.items() if name not in _OF_TIMM}
    model = VisionTransformer(**{**shape, **size, **given})
    # timm keeps these as plain attributes of a model; setattr because they are not declared there.
    for name in ("pretrained_cfg", "default_cfg"):
        setattr(model, name, dict(_CONFIG))
    return model


def initialise(model: VisionTransformer, rng: torch.Generator) -> None:
    """Sine position embeddings and mimetic attention weights, in place, for an untrained demo model.

    The first product of query and key weights is near the identity, so tokens first look at nearby ones
    (Trockman and Kolter, "Mimetic initialization of self-attention layers", 2023).
    """
    dim, grid = model.embed_dim, torch.arange(GRID, dtype=torch.float32)
    frequency = torch.logspace(0, -1.3, dim // 4)
    wave = torch.cat([torch.sin(grid[:, None] * frequency), torch.cos(grid[:, None] * frequency)], dim=1)
    rows, columns = wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)
    with torch.no_grad():
        assert model.pos_embed is not None
        model.pos_embed[0, 1:] = torch.cat([rows, columns], dim=2).flatten(0, 1) * 0.5
        for block in model.blocks:
            _initialise_attention(cast(Attention, block.attn), dim, rng)


def _initialise_attention(attention: Attention, dim: int, rng: torch.Generator) -> None:
    heads, size = attention.num_heads, dim // attention.num_heads
    weight = attention.qkv.weight
    for head in range(heads):
        product = 0.7 * torch.randn(dim, dim, generator=rng) / math.sqrt(dim) + 0.7 * torch.eye(dim)
        u, s, v = torch.linalg.svd(product)
        root = s[:size].sqrt()
        part = slice(head * size, (head + 1) * size)
        weight[:dim][part] = (u[:, :size] * root).T
        weight[dim : 2 * dim][part] = v[:size] * root[:, None]
    product = 0.4 * torch.randn(dim, dim, generator=rng) / math.sqrt(dim) - 0.4 * torch.eye(dim)
    u, s, v = torch.linalg.svd(product)
    weight[2 * dim :] = v * s.sqrt()[:, None]
    attention.proj.weight.copy_(u * s.sqrt())


class DenselyTaught(nn.Module):
    """A demo model with the heads on its patch tokens that only training needs."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        dim, depth = model.embed_dim, len(model.blocks)
        self.taps = (depth // 2 - 1, depth - 1)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(CLASSES) + 1)) for _ in self.taps
        )

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Class logits ``[N, 10]`` and, per tapped block, patch logits ``[N, n, 11]``, the last for background.

        ``images`` is ``[N, 3, 112, 112]``; ``tokens``, int64 ``[N, n]``, names the patches to use, None all of them.
        """
        model = self.model
        position = model.pos_embed
        assert position is not None
        assert model.cls_token is not None
        patches = model.patch_embed(images) + position[:, 1:]
        if tokens is not None:
            patches = patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[2]))
        first = (model.cls_token + position[:, :1]).expand(len(images), -1, -1)
        x, extra = torch.cat([first, patches], dim=1), []
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number in self.taps:
                extra.append(self.heads[self.taps.index(number)](x[:, 1:]))
        return model.forward_head(model.norm(x)), extra


def load_model() -> VisionTransformer:
    """The trained demo model: float32, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If the packaged weights are missing.
        RuntimeError: If the weights do not fit the model exactly.
    """
    if not WEIGHTS_PATH.is_file():
        raise FileNotFoundError(f"the demo weights are missing: no file {WEIGHTS_PATH}")
    state = {name: value.to(torch.float32) for name, value in load_file(WEIGHTS_PATH).items()}
    model = create_model()
    model.load_state_dict(state, strict=True)
    return model.eval()
