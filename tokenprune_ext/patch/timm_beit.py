"""timm's BEiT and BEiT v2: relative position bias, of every block or shared by all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models import beit
from torch import Tensor, nn

from .adapter import Parts, register_host
from .projection import Projected, fused_projection
from .timm_vit import BRANCHES, TimmViT, separate_bias

_BIAS = {"relative_position_bias_table", "relative_position_index"}


@register_host
class TimmBeit(TimmViT):
    """Whatever is a timm Beit; the bias of the tokens that are left is gathered by their places."""

    supported: ClassVar[str] = "timm Beit (BEiT, BEiT v2) with timm's own blocks and attention"
    models: ClassVar[tuple[type, ...]] = (beit.Beit,)
    kinds: ClassVar[Mapping[type, Parts]] = {beit.Block: Parts(BRANCHES, own={"gamma_1", "gamma_2"})}
    post_norm: ClassVar[tuple[type, ...]] = ()
    attentions: ClassVar[Mapping[type, Parts]] = {
        beit.Attention: Parts({"qkv", "attn_drop", "proj", "proj_drop"}, own={"q_bias", "k_bias", "v_bias", *_BIAS})
    }
    container: ClassVar[type] = nn.ModuleList

    def positional(self, vit: Any) -> bool:
        own = any(block.attn.relative_position_bias_table is not None for block in vit.blocks)
        return own or vit.rel_pos_bias is not None

    def project(
        self,
        block: Any,
        x: Tensor,
        queries: int,
        position: Tensor | None,
        shared_rel_pos_bias: Tensor | None = None,
        **call: Any,
    ) -> Projected:
        """``shared_rel_pos_bias``: of all tokens of the dense model, ``[H, 1 + P, 1 + P]``."""
        attn = block.attn
        q, k, v = fused_projection(block.norm1(x), attn.qkv, attn.num_heads, queries, separate_bias(attn))
        bias = None if shared_rel_pos_bias is None else shared_rel_pos_bias.unsqueeze(0)
        if attn.relative_position_bias_table is not None:
            own = attn._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.projected(attn, q, k, v, None if bias is None else _gathered(bias, position, queries))

    def attend(self, block: Any, p: Projected, bias: Tensor | None) -> Tensor:
        if bias is None and p.bias is not None and block.attn.relative_position_bias_table is None:
            # timm hands a shared bias over without a batch dimension, and torch takes another kernel then.
            p = p._replace(bias=p.bias.squeeze(0))
        return super().attend(block, p, bias)


def _gathered(bias: Tensor, position: Tensor | None, queries: int) -> Tensor:
    """``[1, H, 1 + P, 1 + P]`` -> ``[1 or B, H, queries, N]``, of the class token and the places ``[B, N - 1]``."""
    if position is None:
        return bias[:, :, :queries]
    place = F.pad(position + 1, (1, 0))
    return bias[0][:, place[:, :queries, None], place[:, None, :]].transpose(0, 1)
