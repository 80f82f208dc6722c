"""Vision transformers of Hugging Face transformers: ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP image towers.

Classes are known by their names, so that transformers is not imported; it is there when there is a model of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import HostAdapter, Parts, check_parts, kind_of, register_host, unsupported
from .host import Host
from .mixin import dense_class
from .projection import Projected, passed, split_heads


class _Layer(NamedTuple):
    """What a kind of layer calls its parts, and how many tokens come before the patches and registers."""

    prefix: int
    attention: str
    norms: tuple[str, str]
    output: str
    scale: str
    dropout: str
    branches: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # what a branch passes before it is added


_VIT = _Layer(
    1,
    "attention",
    ("layernorm_before", "layernorm_after"),
    "o_proj",
    "scaling",
    "attention_dropout",
    (("dropout",), ("dropout",)),
)
_DINO = _Layer(
    1,
    "attention",
    ("norm1", "norm2"),
    "o_proj",
    "scaling",
    "attention_dropout",
    (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
)
_CLIP = _Layer(1, "self_attn", ("layer_norm1", "layer_norm2"), "out_proj", "scale", "dropout")
_LAYERS: Mapping[str, _Layer] = {
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT._replace(prefix=2),
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "DINOv3ViTLayer": _DINO._replace(dropout="dropout"),
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP._replace(prefix=0),
}
# How many leading tokens a model reads behind its blocks; None when it reads or returns all of them.
_MODELS: Mapping[str, int | None] = {
    "ViTModel": None,
    "ViTForImageClassification": 1,
    "DeiTModel": None,
    "DeiTForImageClassification": 1,
    "DeiTForImageClassificationWithTeacher": 2,
    "Dinov2Model": None,
    "Dinov2ForImageClassification": None,
    "Dinov2WithRegistersModel": None,
    "Dinov2WithRegistersForImageClassification": None,
    "DINOv3ViTModel": None,
    "CLIPVisionModel": None,
    "CLIPVisionModelWithProjection": None,
    "CLIPForImageClassification": None,
    "SiglipVisionModel": None,
    "SiglipForImageClassification": None,
}
_HARMLESS = {"output_hidden_states", "return_dict", "num_items_in_batch", "use_cache"}


@register_host
class TransformersViT(HostAdapter):
    """The layers of these models are alike but for the names of their parts."""

    supported: ClassVar[str] = (
        "transformers ViT, DeiT, DINOv2, DINOv3 ViT, CLIP and SigLIP vision models, bare or for image classification, "
        "as transformers has them from 5.19 on, with sdpa or eager attention"
    )

    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers.models.") and type(model).__name__ in _MODELS

    def inspect(self, model: nn.Module) -> Host:
        blocks = self.blocks(model)
        if not blocks:
            raise unsupported(kind_of(model), "none of its modules is a list of blocks that are known")
        for index, block in enumerate(blocks):
            _check_block(f"block {index}", block)
        first: Any = blocks[0]
        names = _names(first)
        config = getattr(first, names.attention).config
        height, width = _pair(config.image_size)
        rows, columns = (side // patch for side, patch in zip((height, width), _pair(config.patch_size), strict=True))
        return Host(
            model=getattr(model, "name_or_path", "") or type(model).__name__,
            depth=len(blocks),
            input_size=(height, width),
            num_prefix_tokens=names.prefix + getattr(config, "num_register_tokens", 0),
            has_class_token=names.prefix > 0,
            grid=(rows, columns),
            channels=config.hidden_size,
            head_tokens=_MODELS[type(model).__name__],
            positional=hasattr(model, "rope_embeddings"),
            dynamic=True,
            in_channels=config.num_channels,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        for part in model.modules():
            if isinstance(part, nn.ModuleList) and len(part) and _kind(part[0]) in _LAYERS:
                return list(part)
        return []

    def call_arguments(
        self,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        if attention_mask is not None:
            exporting = torch.compiler.is_exporting()  # then transformers makes one itself
            hint = "; export the model with tokenprune_ext.export" if exporting else ""
            raise ValueError(f"attention_mask does not work on a pruned model: the tokens it speaks of are gone{hint}")
        for name, value in options.items():
            if name not in _HARMLESS and value is not None and value is not False:
                raise ValueError(f"{name} does not work on a pruned model: its blocks know nothing of it")
        return {} if position_embeddings is None else {"position_embeddings": position_embeddings}

    def project(
        self,
        block: Any,
        x: Tensor,
        queries: int,
        position: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **call: Any,
    ) -> Projected:
        """``position_embeddings``: cosine and sine of every place on the grid, each ``[P, d]``."""
        names = _names(block)
        attn = getattr(block, names.attention)
        if attn.config.output_attentions:
            raise ValueError("output_attentions does not work on a pruned model: its blocks return no weights")
        x = getattr(block, names.norms[0])(x)
        heads = attn.config.num_attention_heads
        q = split_heads(attn.q_proj(x[:, :queries]), heads)
        k, v = split_heads(attn.k_proj(x), heads), split_heads(attn.v_proj(x), heads)
        if position_embeddings is not None:
            cos, sin = (table if position is None else table[position].unsqueeze(1) for table in position_embeddings)
            q, k = _function_of(attn, "apply_rotary_pos_emb")(q, k, cos, sin)
        dropout = getattr(attn, names.dropout) if attn.training else 0.0
        fused = attn.config._attn_implementation != "eager"
        return Projected(q, k, v, getattr(attn, names.scale), None, dropout, fused)

    def attend(self, block: Any, p: Projected, bias: Tensor | None) -> Tensor:
        if p.fused:
            return super().attend(block, p, bias)
        attn = getattr(block, _names(block).attention)
        eager = _function_of(attn, "eager_attention_forward")
        heads: Tensor = eager(attn, p.q, p.k, p.v, bias, scaling=p.scale, dropout=p.dropout)[0]
        return heads.transpose(1, 2)

    def add_attention(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        names = _names(block)
        out = getattr(getattr(block, names.attention), names.output)(heads.transpose(1, 2).flatten(2))
        return x + _passed(block, out, names.branches[0])

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        names = _names(block)
        out = block.mlp(getattr(block, names.norms[1])(x))
        return x + _passed(block, out, names.branches[1])

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Without the masks of ones that transformers makes then: they keep attention from its fastest kernels."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MAKERS

        known = {name: MAKERS[name] for name in ("sdpa", "eager")}
        for name, maker in known.items():
            MAKERS.register(name, partial(_mask_of_padding, maker))
        try:
            yield
        finally:
            for name, maker in known.items():
                MAKERS.register(name, maker)

    def unpatchable(self, block: nn.Module) -> str | None:
        attn = getattr(block, _names(block).attention)
        hooks = (*attn._forward_hooks.values(), *attn._forward_pre_hooks.values())
        # transformers leaves its own behind, which collect attention weights when a forward asks for them.
        if all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks):
            return None
        return "its attention has forward hooks, which a pruning block does not run"


def _passed(block: nn.Module, out: Tensor, names: tuple[str, ...]) -> Tensor:
    for name in names:
        out = passed(getattr(block, name), out)
    return out


def _check_block(name: str, block: Any) -> None:
    if _kind(block) not in _LAYERS:
        raise unsupported(name, kind_of(block))
    names = _names(block)
    check_parts(name, block, Parts({names.attention, "mlp", *names.norms, *names.branches[0], *names.branches[1]}))
    attn = getattr(block, names.attention)
    check_parts(f"the {names.attention} of {name}", attn, Parts({"q_proj", "k_proj", "v_proj", names.output}))
    implementation = attn.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise unsupported(f"attention implementation {implementation}", 'call model.set_attn_implementation("sdpa")')


def _mask_of_padding(maker: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a mask maker of transformers makes; None where no image is padded."""
    return None if options.get("attention_mask") is None else maker(*args, **options)


def _function_of(attn: nn.Module, name: str) -> Any:
    """A function of the module that an attention's class is defined in."""
    return getattr(sys.modules[type(attn).__module__], name)


def _names(block: nn.Module) -> _Layer:
    return _LAYERS[_kind(block)]


def _kind(block: nn.Module) -> str:
    return dense_class(type(block)).__name__


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
