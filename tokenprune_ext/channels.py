"""The channels inside a block that can go, and a model without some of them: plain, and physically smaller.

Weights of channels that go are cut out; factors of those that stay are multiplied into theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, Mlp  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .patch import UnsupportedModelError, adapter_of, inspect_host, unsupported
from .patch.adapter import kind_of
from .patch.mixin import dense_class
from .patch.narrow import NarrowLinear
from .patch.projection import is_quantised
from .patch.timm_vit import TimmViT

Widths = tuple[int, int, int, int]  # channels at the four places of a block

# A place has the name of the linear layer that reads it: normed input of queries, keys and values; output of the
# heads; normed input of the MLP; its hidden activation.
PLACES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_SUPPORTED = "timm VisionTransformer (ViT, AugReg, DeiT, DeiT-III, DINOv2) of timm's Block, Attention and Mlp"


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks of a model whose channels can be removed, gated and narrow ones among them.

    Raises:
        UnsupportedModelError: another kind of model, or a part whose channels depend on each other; it is named.
    """
    try:
        adapter = adapter_of(model)
        inspect_host(model)
        if type(adapter) is not TimmViT:
            raise unsupported(kind_of(model), "its family has no gates yet")
        blocks = list(adapter.blocks(model))
        for index, block in enumerate(blocks):
            _check(f"blocks.{index}", block)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. VTP supports: {_SUPPORTED}") from None
    return blocks


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layer behind every place, by its name in the model, block after block."""
    return {
        f"blocks.{index}.{place}": block.get_submodule(place)
        for index, block in enumerate(blocks_of(model))
        for place in PLACES
    }


def narrow(model: nn.Module, kept: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Remove all channels but the kept ones from a model without gates, in place.

    The residual stream keeps its width. What goes: the columns of the layer behind each place, the rows of V and of
    the MLP's first layer that made them, and nothing of queries and keys.

    Args:
        model: a model that :func:`~tokenprune_ext.vtp.add_gates` takes.
        kept: int64, ascending, for every place.
        gates: ``[channels]``, factors of every place's channels; None for 1.

    Raises:
        ValueError: a place without kept channels, or with one that it does not have.
    """
    linears = linears_of(model)
    for name, linear in linears.items():
        index = kept[name]
        if not len(index) or int(index[0]) < 0 or int(index[-1]) >= linear.in_features:
            raise ValueError(f"{name} has channels 0..{linear.in_features - 1}, and at least one has to stay")
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} is no dense layer but {type(linear).__name__}")
    for number, block in enumerate(blocks_of(model)):
        names = [f"blocks.{number}.{place}" for place in PLACES]
        narrow_block(block, [kept[name] for name in names], [(gates or {}).get(name) for name in names])
    return model


def narrow_block(block: Any, kept: Sequence[Tensor], gates: Sequence[Tensor | None] = (None,) * len(PLACES)) -> None:
    """Remove all but the kept channels at the four places of one block, in place; see :func:`narrow`."""
    attn, mlp = block.attn, block.mlp
    qkv_in, proj_in, fc1_in, fc2_in = (index.to(attn.qkv.weight.device) for index in kept)
    channels, first_value = attn.qkv.in_features, attn.qkv.out_features * 2 // 3
    rows = torch.cat([torch.arange(first_value, device=proj_in.device), first_value + proj_in])
    residual = torch.arange(channels, device=proj_in.device)
    # The heads keep their shape, so that fused attention takes them: a value that went is 0 between its neighbours.
    attn.qkv = _cut(attn.qkv, rows, qkv_in, gates[0], attn.qkv.out_features, channels, first_value)
    attn.proj = _cut(attn.proj, residual, proj_in, gates[1], channels, attn.proj.in_features)
    mlp.fc1 = _cut(mlp.fc1, fc2_in, fc1_in, gates[2], len(fc2_in), channels)
    mlp.fc2 = _cut(mlp.fc2, residual, fc2_in, gates[3], channels, len(fc2_in))


def widths_of(model: nn.Module) -> list[Widths]:
    """Channels at the four places of every block, those of ``PLACES``; of a dense, gated or narrow model."""
    return [
        (attn.qkv.weight.shape[1], attn.proj.weight.shape[1], mlp.fc1.weight.shape[1], mlp.fc2.weight.shape[1])
        for attn, mlp in ((block.attn, block.mlp) for block in blocks_of(model))
    ]


def narrow_to(model: nn.Module, widths: Sequence[Sequence[int]]) -> nn.Module:
    """Give a dense model these widths, in place, with the first channels of each place: for weights that come after.

    Raises:
        ValueError: widths that the model does not have.
    """
    names = list(linears_of(model))
    flat = [width for block in widths for width in block]
    if len(flat) != len(names):
        raise ValueError(f"expected {len(PLACES)} widths for each of {len(names) // len(PLACES)} blocks, got {widths}")
    return narrow(model, {name: torch.arange(width) for name, width in zip(names, flat, strict=True)})


def _check(name: str, block: Any) -> None:
    if dense_class(type(block)) is not Block:
        raise unsupported(name, kind_of(block))
    if type(block.attn) is not Attention:
        raise unsupported(f"{name}.attn", kind_of(block.attn))
    for part in ("norm", "gate"):
        if not isinstance(getattr(block.attn, part, None), nn.Identity | None):
            raise unsupported(f"{name}.attn.{part}", "it ties the channels of the heads together")
    if type(block.mlp) is not Mlp:
        raise unsupported(f"{name}.mlp", kind_of(block.mlp))
    if not isinstance(getattr(block.mlp, "norm", None), nn.Identity | None):
        raise unsupported(f"{name}.mlp.norm", "it ties the hidden channels together")
    for place in PLACES:
        linear = block.get_submodule(place)
        if dense_class(type(linear)) not in (nn.Linear, NarrowLinear) or is_quantised(linear):
            raise unsupported(f"{name}.{place}", f"{kind_of(linear)}, expected a plain linear layer")
        if "forward" in vars(linear):
            raise unsupported(f"{name}.{place}", "its forward was replaced on this instance by other software")


def _cut(
    linear: nn.Linear,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    out_features: int,
    in_features: int,
    whole: int = 0,
) -> nn.Linear:
    """These rows and columns of a layer, which from outside has so many features; of the first rows ``whole`` stay."""
    weight, bias = linear.weight.detach(), linear.bias
    where: dict[str, Any] = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    new: nn.Linear
    if (len(rows), len(columns)) == (out_features, in_features):
        new = skip_init(nn.Linear, in_features, out_features, **where)
    else:
        new = skip_init(NarrowLinear, in_features, out_features, len(columns), len(rows), whole=whole, **where)
        for buffer, index in ((new.inputs, columns), (new.outputs, rows[whole:] - whole)):
            if isinstance(buffer, Tensor):
                buffer.copy_(index)
    with torch.no_grad():
        new.weight.copy_((weight if scale is None else weight * scale)[rows][:, columns])
        new.weight.requires_grad_(linear.weight.requires_grad)
        if bias is not None:
            new.bias.copy_(bias[rows])
            new.bias.requires_grad_(bias.requires_grad)
    return new.train(linear.training)
