"""timm's VisionTransformer family: ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP image towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor, nn

from .adapter import HostAdapter, Parts, check_parts, kind_of, register_host, unsupported
from .host import Host
from .mixin import Mixin, dense_class
from .projection import Projected, fused_projection, is_quantised, passed
from .timm_features import FullGridFeatures

BRANCHES = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
_ATTENTION = Parts(
    {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"},
    optional={"norm", "gate"},  # scale norm and output gate; older timm does not have them
)


@register_host
class TimmViT(HostAdapter):
    """Whatever is a timm VisionTransformer with timm's own pre-norm or post-norm block and attention.

    timm's other transformers derive from it: only the way to queries, keys and values differs.

    Class attributes:
        models: the classes of models.
        kinds: the classes of blocks, and what they consist of.
        post_norm: those of them that norm what comes out of attention and MLP.
        attentions: the classes of their ``attn``, and what those consist of.
        container: the class of the model's ``blocks``.
    """

    models: ClassVar[tuple[type, ...]] = (VisionTransformer, VisionTransformerDistilled)
    kinds: ClassVar[Mapping[type, Parts]] = {Block: Parts(BRANCHES | {"ls1", "ls2"}), ResPostBlock: Parts(BRANCHES)}
    post_norm: ClassVar[tuple[type, ...]] = (ResPostBlock,)
    attentions: ClassVar[Mapping[type, Parts]] = {Attention: _ATTENTION}
    container: ClassVar[type] = nn.Sequential

    supported: ClassVar[str] = (
        "timm VisionTransformer and VisionTransformerDistilled (ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP) "
        "whose blocks are timm's Block or ResPostBlock with timm's Attention"
    )
    mixin: ClassVar[type[Mixin] | None] = FullGridFeatures

    def matches(self, model: nn.Module) -> bool:
        return dense_class(type(model)) in self.models

    def inspect(self, model: nn.Module) -> Host:
        vit: Any = model
        container: type = type(vit.blocks)
        if container is not self.container or len(set(vit.blocks)) != len(vit.blocks):
            expected = f"expected a {self.container.__name__} of distinct blocks"
            raise unsupported("blocks", f"{kind_of(vit.blocks)} ({expected})")
        for index, block in enumerate(vit.blocks):
            self._check_block(f"blocks.{index}", block)
        patch_drop = getattr(vit, "patch_drop", None)
        if not isinstance(patch_drop, nn.Identity | None):
            raise unsupported("patch_drop", f"{kind_of(patch_drop)}; build the model with patch_drop_rate=0")
        if vit.patch_embed.num_patches is None:
            raise unsupported("patch_embed", "built without an image size; build the model with img_size=...")
        height, width = vit.patch_embed.img_size
        token_pool = vit.global_pool == "token" and getattr(vit, "attn_pool", None) is None
        read = 2 if isinstance(vit, VisionTransformerDistilled) else 1
        return Host(
            model=(getattr(model, "pretrained_cfg", None) or {}).get("architecture")
            or dense_class(type(model)).__name__,
            depth=len(vit.blocks),
            input_size=(int(height), int(width)),
            num_prefix_tokens=vit.num_prefix_tokens,
            has_class_token=vit.cls_token is not None,
            grid=tuple(vit.patch_embed.grid_size),
            channels=vit.embed_dim,
            head_tokens=read if token_pool else None,
            positional=self.positional(vit),
            dynamic=bool(getattr(vit, "dynamic_img_size", False)),
            in_channels=next(part for part in vit.patch_embed.modules() if isinstance(part, nn.Conv2d)).in_channels,
        )

    def positional(self, vit: Any) -> bool:
        """Whether its blocks need to know where a token was in the image."""
        return False

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        vit: Any = model
        return list(vit.blocks)

    def call_arguments(self, attn_mask: Tensor | None = None, is_causal: bool = False, **call: Any) -> dict[str, Any]:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal do not work on a pruned model: the tokens they speak of are gone")
        return call

    def project(self, block: Any, x: Tensor, queries: int, position: Tensor | None, **call: Any) -> Projected:
        attn = block.attn
        q, k, v = fused_projection(self.attention_input(block, x), attn.qkv, attn.num_heads, queries)
        return self.projected(attn, passed(attn.q_norm, q), passed(attn.k_norm, k), v)

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        """What the block hands to its ``attn``."""
        return x if self._is_post_norm(block) else block.norm1(x)

    def projected(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Projected:
        """Queries, keys and values with the settings of an ``attn``."""
        return Projected(q, k, v, attn.scale, bias, attn.attn_drop.p if attn.training else 0.0, attn.fused_attn)

    def add_attention(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        attn = block.attn
        out = heads.transpose(1, 2).flatten(2)
        norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
        if norm is not None:
            out = passed(norm, out)
        if gate is not None:
            out = out * gate(self.attention_input(block, x)).sigmoid()
        out = passed(attn.proj_drop, attn.proj(out))
        if self._is_post_norm(block):
            out = block.norm1(out)
        return x + passed(block.drop_path1, _scaled(block, out, 1))

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        out = block.norm2(block.mlp(x)) if self._is_post_norm(block) else block.mlp(block.norm2(x))
        return x + passed(block.drop_path2, _scaled(block, out, 2))

    def unpatchable(self, block: Any) -> str | None:
        if block.attn._forward_hooks or block.attn._forward_pre_hooks:
            return "its attn has forward hooks, which a pruning block does not run"
        return None

    def _is_post_norm(self, block: nn.Module) -> bool:
        return isinstance(block, self.post_norm)

    def _check_block(self, name: str, block: Any) -> None:
        kind = dense_class(type(block))
        if kind not in self.kinds:
            raise unsupported(name, kind_of(block))
        check_parts(name, block, self.kinds[kind])
        attn = block.attn
        if type(attn) not in self.attentions:
            raise unsupported(f"{name}.attn", kind_of(attn))
        check_parts(f"{name}.attn", attn, self.attentions[type(attn)])
        if getattr(attn, "qkv_bias_separate", False):
            raise unsupported(f"{name}.attn", "qkv_bias_separate")
        if getattr(attn, "q_bias", None) is not None and is_quantised(attn.qkv):
            raise unsupported(f"{name}.attn.qkv", "timm's own forward cannot run it quantised; leave it as it is")


def separate_bias(attn: Any) -> Tensor | None:
    """The bias of a fused projection whose keys have none, as EVA and BEiT keep it; None for no bias."""
    return None if getattr(attn, "q_bias", None) is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _scaled(block: Any, out: Tensor, branch: int) -> Tensor:
    """LayerScale of the first or second branch, as a module or as a parameter."""
    scale = getattr(block, f"ls{branch}", None)
    if scale is not None:
        return passed(scale, out)
    gamma = getattr(block, f"gamma_{branch}", None)
    return out if gamma is None else gamma * out
