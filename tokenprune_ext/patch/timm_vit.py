"""timm's VisionTransformer family: ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP image towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor, nn

from .adapter import HostAdapter, Projected, check_parts, kind_of, register_host, unsupported
from .host import Host
from .mixin import Mixin, dense_class
from .timm_features import FullGridFeatures

_BLOCK_PARTS = {
    Block: {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"},
    ResPostBlock: {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"},
}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}
_ATTENTION_OPTIONAL = {"norm", "gate"}  # scale norm and output gate; older timm does not have them


@register_host
class TimmViT(HostAdapter):
    """Whatever is a timm VisionTransformer with timm's own pre-norm or post-norm block and attention."""

    supported: ClassVar[str] = (
        "timm VisionTransformer and VisionTransformerDistilled (ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP) "
        "whose blocks are timm's Block or ResPostBlock with timm's Attention"
    )
    mixin: ClassVar[type[Mixin] | None] = FullGridFeatures

    def matches(self, model: nn.Module) -> bool:
        return _class(model) in (VisionTransformer, VisionTransformerDistilled)

    def inspect(self, model: nn.Module) -> Host:
        vit: Any = model
        if type(vit.blocks) is not nn.Sequential or len(set(vit.blocks)) != len(vit.blocks):
            raise unsupported("blocks", f"{kind_of(vit.blocks)} (expected a Sequential of distinct blocks)")
        for index, block in enumerate(vit.blocks):
            _check_block(f"blocks.{index}", block)
        if not isinstance(vit.patch_drop, nn.Identity):
            raise unsupported("patch_drop", f"{kind_of(vit.patch_drop)}; build the model with patch_drop_rate=0")
        if vit.patch_embed.num_patches is None:
            raise unsupported("patch_embed", "built without an image size; build the model with img_size=...")
        height, width = vit.patch_embed.img_size
        distilled = isinstance(vit, VisionTransformerDistilled)
        return Host(
            model=(getattr(model, "pretrained_cfg", None) or {}).get("architecture") or _class(model).__name__,
            depth=len(vit.blocks),
            input_size=(int(height), int(width)),
            num_prefix_tokens=vit.num_prefix_tokens,
            has_class_token=vit.cls_token is not None,
            grid=tuple(vit.patch_embed.grid_size),
            channels=vit.embed_dim,
            head_tokens=(2 if distilled else 1) if vit.global_pool == "token" and vit.attn_pool is None else None,
            dynamic=bool(getattr(vit, "dynamic_img_size", False)),
            in_channels=next(part for part in vit.patch_embed.modules() if isinstance(part, nn.Conv2d)).in_channels,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        vit: Any = model
        return list(vit.blocks)

    def call_arguments(self, attn_mask: Tensor | None = None, is_causal: bool = False) -> dict[str, Any]:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal do not work on a pruned model: the tokens they speak of are gone")
        return {}

    def project(self, block: Any, x: Tensor, queries: int, position: Tensor | None, **call: Any) -> Projected:
        attn = block.attn
        x = _attention_input(block, x)
        q, k, v = fused_projection(x, attn.qkv, attn.num_heads, queries)
        q, k = attn.q_norm(q), attn.k_norm(k)
        dropout = attn.attn_drop.p if attn.training else 0.0
        return Projected(q, k, v, attn.scale, None, dropout, attn.fused_attn)

    def add_attention(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        attn = block.attn
        out = heads.transpose(1, 2).flatten(2)
        norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(_attention_input(block, x)).sigmoid()
        out = attn.proj_drop(attn.proj(out))
        out = block.norm1(out) if isinstance(block, ResPostBlock) else block.ls1(out)
        return x + block.drop_path1(out)

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        if isinstance(block, ResPostBlock):
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def unpatchable(self, block: Any) -> str | None:
        if block.attn._forward_hooks or block.attn._forward_pre_hooks:
            return "its attn has forward hooks, which a pruning block does not run"
        return None


def fused_projection(x: Tensor, qkv: nn.Module, heads: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, queries, d]``, keys and values ``[B, H, N, d]`` of tokens ``[B, N, C]``, by one linear layer.

    Asked for few queries, it multiplies the rest of the tokens with the weights of keys and values alone; a layer that
    is not a plain linear one (an adapter, a quantised layer) is run whole.
    """
    batch, tokens, _ = x.shape
    if queries == tokens or type(qkv) is not nn.Linear:
        out = qkv(x)
        q, k, v = out.reshape(batch, tokens, 3, heads, out.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return q[:, :, :queries], k, v
    width = qkv.out_features // 3
    q_bias, kv_bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
    q = F.linear(x[:, :queries], qkv.weight[:width], q_bias).unflatten(2, (heads, width // heads)).transpose(1, 2)
    kv = F.linear(x, qkv.weight[width:], kv_bias).unflatten(2, (2, heads, width // heads)).permute(2, 0, 3, 1, 4)
    return q, kv[0], kv[1]


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of a module that may be patched."""
    return dense_class(type(module))


def _attention_input(block: Any, x: Tensor) -> Tensor:
    return x if isinstance(block, ResPostBlock) else block.norm1(x)


def _check_block(name: str, block: Any) -> None:
    kind = _class(block)
    if kind not in _BLOCK_PARTS:
        raise unsupported(name, kind_of(block))
    check_parts(name, block, _BLOCK_PARTS[kind])
    if type(block.attn) is not Attention:
        raise unsupported(f"{name}.attn", kind_of(block.attn))
    check_parts(f"{name}.attn", block.attn, _ATTENTION_PARTS, _ATTENTION_OPTIONAL)
