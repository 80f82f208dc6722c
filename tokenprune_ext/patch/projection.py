"""From tokens to queries, keys and values, and from those to the output of the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .narrow import NarrowLinear


class Projected(NamedTuple):
    """Queries, keys and values of a block, ready for attention.

    Attributes:
        q: ``[B, H, Q, d]``, of the first Q tokens; Q is N unless only some queries were asked for.
        k: ``[B, H, N, d]``.
        v: ``[B, H, N, d]``.
        scale: factor of the logits.
        bias: added to the logits, ``[1 or B, H, Q, N]``; None for nothing.
        dropout: probability of dropping an attention weight.
        fused: whether the block uses torch's fused attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None
    dropout: float = 0.0
    fused: bool = True


def attend(p: Projected, bias: Tensor | None) -> Tensor:
    """Output of every head, ``[B, H, Q, d]``; ``bias`` ``[B, 1, 1, N]`` comes on top of the block's own."""
    if p.bias is not None:
        bias = p.bias if bias is None else p.bias + bias
    if p.fused:
        return F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=bias, dropout_p=p.dropout, scale=p.scale)
    logits = (p.q * p.scale) @ p.k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return torch.dropout(weights, p.dropout, train=p.dropout > 0) @ p.v


def passed(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, without the call where it gives ``x`` back: a block has up to eight of those, microseconds each.

    A module with hooks is called all the same, for torch's hooks of all modules at once it is not.
    """
    if type(module) is not nn.Identity and (type(module) is not nn.Dropout or module.training):
        return module(x)
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return module(x) if hooked else x


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * d]`` -> ``[B, heads, N, d]``."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight is none to compute with: torchao's tensors are made of others, torch.ao has a function."""
    return not isinstance(linear.weight, Tensor) or hasattr(linear.weight, "__tensor_flatten__")


def fused_projection(
    x: Tensor, qkv: Any, heads: int, queries: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, queries, d]``, keys and values ``[B, H, N, d]`` of tokens ``[B, N, C]``, by one linear layer.

    Asked for few queries, it multiplies the rest of the tokens with the weights of keys and values alone; a layer that
    is not a plain or narrow linear one (an adapter, a quantised layer) is run whole. ``bias`` stands in for one of the
    layer. A narrow one has the rows of every query and key.
    """
    if queries == x.shape[1] or type(qkv) not in (nn.Linear, NarrowLinear) or is_quantised(qkv):
        out = qkv(x) if bias is None else F.linear(x, qkv.weight, bias)
        q, k, v = out.view(*x.shape[:2], 3, heads, out.shape[2] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return (q if queries == x.shape[1] else q[:, :, :queries]), k, v
    width = qkv.out_features // 3
    bias = qkv.bias if bias is None else bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    x = qkv.read(x) if isinstance(qkv, NarrowLinear) else x
    q = split_heads(F.linear(x[:, :queries], qkv.weight[:width], q_bias), heads)
    kv = F.linear(x, qkv.weight[width:], kv_bias)
    k, v = split_heads(qkv.write(kv, width) if isinstance(qkv, NarrowLinear) else kv, 2 * heads).chunk(2, 1)
    return q, k, v
