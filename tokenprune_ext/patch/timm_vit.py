"""timm's VisionTransformer family: ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP image towers.

Patching swaps the class of the pruning blocks and stores one plain object in each; nothing else is touched. No module,
parameter, buffer or hook is added, so state dict, deepcopy, pickle and moving between devices work as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor, nn

from .context import AttentionContext, Reduced
from .host import Host, UnsupportedModelError
from .sources import record

SUPPORTED = (
    "timm VisionTransformer and VisionTransformerDistilled (ViT, AugReg, DeiT, DeiT-III, DINOv2, SigLIP, CLIP) "
    "whose blocks are timm.models.vision_transformer.Block with timm's Attention"
)
_MODELS = (VisionTransformer, VisionTransformerDistilled)
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}
_ATTENTION_OPTIONAL = {"norm", "gate"}  # scale norm and output gate; older timm does not have them
_STEP = "_tokenprune_step"
_RECORD = "_tokenprune_record"
# What these return or cut assumes that every block has a full grid of patch tokens.
_DENSE_ONLY = ("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers")


class TokenMethod(Protocol):
    """What a pruning block asks of a method (see ``tokenprune_ext.methods.Method``)."""

    @property
    def where(self) -> Literal["attention", "block"]: ...

    def reduce(self, x: Tensor, ctx: AttentionContext, keep: int) -> Reduced: ...


@dataclass(frozen=True)
class PruningStep:
    """What one pruning block does: ``num_patches`` patch tokens come in, ``keep`` leave."""

    method: TokenMethod
    layer: int
    num_patches: int
    keep: int
    host: Host


class PrunedBlock(Block):
    """timm's Block, with tokens removed between attention and MLP or after the MLP. Made by patching, never directly.

    Everything of the dense block is computed as timm does it, bit for bit; query, key and value are computed once and
    shared with the method.
    """

    _tokenprune_step: PruningStep

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` -> ``[B, N - num_patches + keep, C]``.

        Raises:
            ValueError: a mask was given, or the number of tokens is not the one the schedule was made for.
        """
        step = self._tokenprune_step
        _check_call(step, x, attn_mask, is_causal)
        attended, context = self._attend(self.norm1(x))
        x = x + self.drop_path1(self.ls1(attended))
        if step.method.where == "attention":
            x = _reduce(step, x, context)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if step.method.where == "block":
            x = _reduce(step, x, context)
        return x

    def _attend(self, x: Tensor) -> tuple[Tensor, AttentionContext]:
        """The block's attention on normed tokens ``[B, N, C]``: the same operations in the same order as timm's."""
        attn: Any = self.attn
        host = self._tokenprune_step.host
        batch, tokens, _ = x.shape
        gate = getattr(attn, "gate", None)
        opening = None if gate is None else gate(x).sigmoid()
        qkv = attn.qkv(x)
        head_dim = qkv.shape[-1] // (3 * attn.num_heads)
        q, k, v = qkv.reshape(batch, tokens, 3, attn.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
        else:
            weights = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            out = attn.attn_drop(weights) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, attn.num_heads * head_dim)
        norm = getattr(attn, "norm", None)
        if norm is not None:
            out = norm(out)
        if opening is not None:
            out = out * opening
        context = AttentionContext(
            q=q.detach(),
            k=k.detach(),
            v=v.detach(),
            scale=attn.scale,
            num_prefix=host.num_prefix_tokens,
            has_class_token=host.has_class_token,
            layer=self._tokenprune_step.layer,
            depth=host.depth,
        )
        return attn.proj_drop(attn.proj(out)), context


def _check_call(step: PruningStep, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal do not work on a pruned model: the tokens they speak of are gone")
    prefix = step.host.num_prefix_tokens
    if x.shape[1] != prefix + step.num_patches:
        height, width = step.host.input_size
        raise ValueError(
            f"block {step.layer} got {x.shape[1]} tokens and expects {prefix + step.num_patches} ({prefix} prefix + "
            f"{step.num_patches} patch): the schedule was made for {height} x {width} images; apply it again for "
            "another input size"
        )


def _reduce(step: PruningStep, x: Tensor, context: AttentionContext) -> Tensor:
    reduced = step.method.reduce(x, context, step.keep)
    record(step.layer, reduced, context.num_prefix, step.num_patches)
    return reduced.x


def _no_dense_features(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for the methods of ``_DENSE_ONLY`` on a pruned model."""
    raise ValueError(
        f"{', '.join(_DENSE_ONLY)} do not work on a pruned model: its blocks have no full grid of patches; "
        "call tokenprune_ext.remove first"
    )


def inspect_host(model: nn.Module) -> Host:
    """Check that a model, patched or not, is one this family understands, and read its geometry. Changes nothing.

    Raises:
        UnsupportedModelError: it is not; the message names the part that is unknown.
    """
    if type(model) not in _MODELS:
        hint = "; patch the model before torch.compile wraps it" if hasattr(model, "_orig_mod") else ""
        raise UnsupportedModelError(f"{_kind(model)} is not supported{hint}. Supported: {SUPPORTED}")
    vit: Any = model
    if type(vit.blocks) is not nn.Sequential or len(set(vit.blocks)) != len(vit.blocks):
        raise _unsupported("blocks", f"{_kind(vit.blocks)} (expected a Sequential of distinct blocks)")
    for index, block in enumerate(vit.blocks):
        _check_block(f"blocks.{index}", block)
    if not isinstance(vit.patch_drop, nn.Identity):
        raise _unsupported("patch_drop", f"{_kind(vit.patch_drop)}; build the model with patch_drop_rate=0")
    if record_of(model) is None and any(name in vars(model) for name in _DENSE_ONLY):
        raise _unsupported("forward_intermediates", "a function set on this instance by other software")
    if vit.patch_embed.num_patches is None:
        raise _unsupported("patch_embed", "built without an image size; build the model with img_size=...")
    height, width = vit.patch_embed.img_size
    config = getattr(model, "pretrained_cfg", None) or {}
    return Host(
        model=config.get("architecture") or type(model).__name__,
        depth=len(vit.blocks),
        input_size=(int(height), int(width)),
        num_prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        num_patches=vit.patch_embed.num_patches,
    )


def install(model: nn.Module, steps: Mapping[int, PruningStep], record: object) -> None:
    """Turn the blocks named by ``steps`` into pruning blocks, and keep ``record`` on the model.

    The model must have passed :func:`inspect_host`. Replaces an earlier patch.

    Raises:
        UnsupportedModelError: the attention of a pruning block has forward hooks. Nothing is changed then.
    """
    blocks: Any = model.blocks
    for index in steps:
        attn = blocks[index].attn
        if attn._forward_hooks or attn._forward_pre_hooks:
            raise _unsupported(f"blocks.{index}.attn", "forward hooks, which a pruning block does not run")
    uninstall(model)
    for index, step in steps.items():
        blocks[index].__class__ = PrunedBlock
        setattr(blocks[index], _STEP, step)
    if steps:
        for name in _DENSE_ONLY:
            setattr(model, name, _no_dense_features)
    setattr(model, _RECORD, record)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install` exactly; does nothing to a model that is not patched."""
    if record_of(model) is None:
        return
    blocks: Any = model.blocks
    for block in blocks:
        if type(block) is PrunedBlock:
            block.__class__ = Block  # type: ignore[assignment]
            delattr(block, _STEP)
    for name in _DENSE_ONLY:
        if vars(model).get(name) is _no_dense_features:
            delattr(model, name)
    delattr(model, _RECORD)


def record_of(model: nn.Module) -> Any:
    """What :func:`install` was given as ``record``; None for a model that is not patched."""
    return vars(model).get(_RECORD)


def _check_block(name: str, block: Any) -> None:
    if type(block) not in (Block, PrunedBlock):
        raise _unsupported(name, _kind(block))
    _check_parts(name, block, _BLOCK_PARTS, set())
    if type(block.attn) is not Attention:
        raise _unsupported(f"{name}.attn", _kind(block.attn))
    _check_parts(f"{name}.attn", block.attn, _ATTENTION_PARTS, _ATTENTION_OPTIONAL)


def _check_parts(name: str, module: nn.Module, needed: set[str], optional: set[str]) -> None:
    """Whatever this software does not know of could change the result and must not be left out silently."""
    parts = {part for part, child in module._modules.items() if child is not None}
    own = {part for part, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
    unknown, missing = (parts - needed - optional) | own, needed - parts
    if unknown or missing:
        raise _unsupported(name, f"unknown parts {sorted(unknown)}, missing parts {sorted(missing)}")
    if "forward" in vars(module):
        raise _unsupported(name, "its forward was replaced on this instance by other software")


def _unsupported(part: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{part} is not supported: {what}. Supported: {SUPPORTED}")


def _kind(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
