"""timm's Eva family: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embedding, Sapiens2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import eva
from torch import Tensor, nn

from .adapter import Parts, register_host
from .projection import Projected, fused_projection, passed, split_heads
from .timm_vit import BRANCHES, TimmViT, separate_bias

_BLOCK = Parts(BRANCHES, own={"gamma_1", "gamma_2"})
_ATTENTION = Parts(
    {"attn_drop", "proj", "proj_drop"},
    optional={"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "norm", "gate"},
    own={"q_bias", "k_bias", "v_bias"},
)


@register_host
class TimmEva(TimmViT):
    """Whatever is a timm Eva: rotary embeddings of any kind, fused or separate projections, grouped queries."""

    supported: ClassVar[str] = "timm Eva (EVA, EVA-02, DINOv3, PE, RoPE ViTs) with timm's own blocks and attention"
    models: ClassVar[tuple[type, ...]] = (eva.Eva,)
    kinds: ClassVar[Mapping[type, Parts]] = {eva.EvaBlock: _BLOCK, eva.EvaBlockPostNorm: _BLOCK}
    post_norm: ClassVar[tuple[type, ...]] = (eva.EvaBlockPostNorm,)
    # Older timm has no AttentionRope.
    attentions: ClassVar[Mapping[type, Parts]] = {
        eva.EvaAttention: _ATTENTION,
        getattr(eva, "AttentionRope", eva.EvaAttention): _ATTENTION,
    }
    container: ClassVar[type] = nn.ModuleList

    def positional(self, vit: Any) -> bool:
        return vit.rope is not None

    def project(
        self, block: Any, x: Tensor, queries: int, position: Tensor | None, rope: Tensor | None = None, **call: Any
    ) -> Projected:
        """``rope``: sine and cosine of every place on the grid, ``[P, 2 d]``, or of every head, ``[H, P, 2 d]``."""
        attn = block.attn
        x = self.attention_input(block, x)
        if attn.qkv is not None:
            q, k, v = fused_projection(x, attn.qkv, attn.num_heads, queries, separate_bias(attn))
        else:
            kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
            q = split_heads(attn.q_proj(x[:, :queries]), attn.num_heads)
            k, v = split_heads(attn.k_proj(x), kv_heads), split_heads(attn.v_proj(x), kv_heads)
        if getattr(attn, "q_norm", None) is not None:
            q, k = passed(attn.q_norm, q), passed(attn.k_norm, k)
        if rope is not None:
            rope = rope if position is None else _gathered(rope, position)
            q, k = _rotated(attn, q, rope).type_as(v), _rotated(attn, k, rope).type_as(v)
        groups = attn.num_heads // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.projected(attn, q, k, v)


def _gathered(rope: Tensor, position: Tensor) -> Tensor:
    """The rows of the places ``[B, n]``: ``[B, 1 or H, n, 2 d]``."""
    rows = rope[..., position, :]
    return rows.unsqueeze(1) if rope.dim() == 2 else rows.transpose(0, 1)


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """``[B, H, N, d]`` with the patch tokens rotated."""
    prefix = attn.num_prefix_tokens
    patches = x.shape[2] - prefix
    if patches <= 0:  # queries of prefix tokens alone
        return x
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}  # unknown to older timm
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope[..., :patches, :], **half)
    return torch.cat([x[:, :, :prefix], rotated], dim=2)
