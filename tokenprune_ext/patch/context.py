"""The interface between a pruning block and a method: what it may look at, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenprune_ext import ops


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """The tokens of one block and its attention, for one forward.

    ``q``, ``k``, ``v`` and what is computed from them carry no gradient: which tokens stay is not differentiable.
    The attention matrix is not part of it: :meth:`attention_received` and :meth:`page_rank` score from ``q`` and ``k``.

    Attributes:
        x: the tokens where they are to be reduced, ``[B, N, C]``; carries gradient.
        q: queries ``[B, H, N, d]``, after query norm and rotary embedding, not scaled.
        k: keys ``[B, H, N, d]``, after key norm and rotary embedding.
        v: values ``[B, H, N, d]``.
        scale: factor of the logits.
        num_prefix: tokens in front of the patch tokens; may be 0.
        has_class_token: whether token 0 is a class token.
        layer: 0-based index of the block.
        depth: number of blocks of the model.
        size: patches each token stands for, ``[B, N]``; None for 1.
        bias: added to the logits, ``softmax(q k^T * scale + bias)``: ``[B, 1, 1, N]`` or ``[1 or B, H, N, N]``; None
            for nothing.
        learned: the submodule that was trained for this block, of methods that learn (``Method.learned``).
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    num_prefix: int
    has_class_token: bool
    layer: int
    depth: int
    size: Tensor | None = None
    bias: Tensor | None = None
    learned: nn.Module | None = None

    @property
    def num_patches(self) -> int:
        """Patch tokens that came in."""
        return self.x.shape[1] - self.num_prefix

    @property
    def has_dense_bias(self) -> bool:
        """Whether the bias is a matrix, not a row that all queries share."""
        return _is_dense(self.bias)

    def biased(self) -> tuple[Tensor, Tensor]:
        """Queries and keys whose product holds the bias of the keys, which must not be dense."""
        return _biased(self.q, self.k, self.bias, self.scale)

    def class_attention(self) -> Tensor:
        """Attention of the class token to every token ``[B, H, N]``, float32 (float64 for float64); O(N) memory.

        Raises:
            ValueError: the model has no class token.
        """
        if not self.has_class_token:
            raise ValueError("class_attention needs a class token, and this model has none")
        logits = (self.q[:, :, :1] * self.scale) @ self.k.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias[:, :, :1]
        return torch.softmax(logits.squeeze(2), dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def attention_given(self, head_reduce: str, value_length: bool = False) -> Tensor:
        """Attention the class token gives every token, over the heads, ``[B, N]``; see ``ops.class_attention``.

        Args:
            head_reduce: ``mean``, ``max`` or ``sum`` over the heads.
            value_length: multiply it, head by head, with the length of the token's value vector.

        Raises:
            ValueError: the model has no class token.
        """
        if not self.has_class_token:
            raise ValueError("attention_given needs a class token, and this model has none")
        dtype, bias = self.q.dtype, self.bias
        if bias is not None:
            bias = _of_dtype(bias[:, :, :1] if bias.shape[2] > 1 else bias, dtype)
        v = _of_dtype(self.v, dtype) if value_length else None  # under autocast, rotary queries alone are float32
        return ops.class_attention(self.q, self.k, self.scale, v, bias, head_reduce)

    def attention_received(self, head_reduce: str, query_rows: str) -> Tensor:
        """Attention every token gets, ``[B, N]``; see ``ops.attn_colsum`` for the arguments."""
        if _is_dense(self.bias):
            attn = _attention(self.q, self.k, self.bias, self.scale, 1.0)
            return ops.attn_colsum(attn, head_reduce, query_rows, self.num_prefix)
        q, k = self.biased()
        return ops.attn_colsum_qk(q, k, self.scale, head_reduce, query_rows, self.num_prefix)

    def page_rank(
        self, start: Tensor | None, iters: int, tol: float = 0.0, tau: float = 1.0, among: Tensor | None = None
    ) -> Tensor:
        """Weighted page rank of every head, ``[B, H, N]``, on the attention at temperature ``tau``; see ``ops.wpr``.

        With ``among`` ``[B, K]``, as if there were the prefix tokens and the patch tokens there alone; ascending. Then
        N is their number.
        """
        q, k, bias = self.q, self.k, self.bias
        if _is_dense(bias):
            if among is not None:
                places = self._places(among)
                q, k = (_take_places(part, places, 2) for part in (q, k))
                bias = _take_places(_take_places(bias, places, 3), places, 2)
            return ops.wpr(_attention(q, k, bias, self.scale, tau), start, iters, tol)
        q, k = self.biased()
        num_prefix = 0 if among is None else self.num_prefix
        return ops.wpr_qk(q, k, self.scale / tau, start, iters, tol, among, num_prefix)

    def take(self, tensor: Tensor, kept: Tensor, dim: int = 1) -> Tensor:
        """The prefix tokens and the patch tokens at ``kept`` ``[B, K]``, of a tensor whose ``dim`` is the tokens."""
        return _take_places(tensor, self._places(kept), dim)

    def _places(self, kept: Tensor) -> Tensor:
        """The prefix tokens and those at ``kept``, counted through the tokens of all images."""
        batch, tokens = kept.shape[0], self.x.shape[1]
        prefix = torch.arange(self.num_prefix, device=kept.device).expand(batch, -1)
        places = torch.cat([prefix, kept], 1)
        return places if batch == 1 else places + torch.arange(batch, device=kept.device).unsqueeze(1) * tokens


def _is_dense(bias: Tensor | None) -> TypeGuard[Tensor]:
    """Whether the bias is a matrix, not a row that all queries share."""
    return bias is not None and bias.shape[2] > 1


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _attention(q: Tensor, k: Tensor, bias: Tensor, scale: float, tau: float) -> Tensor:
    """The attention matrix ``[B, H, N, N]``, of models whose bias is such a matrix already."""
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    return (logits / tau).softmax(-1)


def _biased(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product holds the bias of the keys: one more channel, 1 times bias / scale."""
    if bias is None:
        return q, k
    # Padding has a bias of minus infinity; times the zeros beside it, that would be NaN.
    least = torch.finfo(k.dtype).min / 4 * scale
    column = (bias.clamp_min(least) / scale).transpose(2, 3).to(k.dtype)
    extra = 8 - q.shape[-1] % 8
    k = torch.cat([k, column.expand(-1, k.shape[1], -1, -1)], -1)
    return pad(pad(q, (0, 1), value=1.0), (0, extra - 1)), pad(k, (0, extra - 1))


def _take_places(tensor: Tensor, places: Tensor, dim: int) -> Tensor:
    """Whole rows of all images at once: a gather along ``dim`` would look up every number on its own."""
    batch, count = places.shape
    rows = (tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])).transpose(1, dim)
    taken = rows.flatten(0, 1).index_select(0, places.flatten())
    return taken.view(batch, count, *taken.shape[1:]).transpose(1, dim)


@dataclass(frozen=True, eq=False)
class Reduced:
    """The tokens a pruning layer lets through.

    Attributes:
        x: prefix tokens, kept patch tokens in their original order, then the fused token if there is one;
            ``[B, num_prefix + keep, C]``.
        kept: positions of the kept patch tokens among the tokens that came in, ascending; int64 ``[B, kept]``.
        fused: whether the last token stands for every token that was not kept.
        size: patches each token stands for, ``[B, num_prefix + keep]``; None when the method does not count them.
        into: int64 ``[B, N]``: for every token that came in, the position, among those that came in, of the kept token
            it was merged into, or -1. Called only when somebody asks which token stands for which patch. Kept tokens
            may say anything. None when nothing was merged.
        bias: whether later blocks add log(size) to their attention logits.
        scores: what the tokens that came in were ranked by, ``[B, N]``, floating, NaN for those that were not. Called
            only when somebody asks. None when the method does not rank.
        log_size: log(size) as ``[B, 1, 1, num_prefix + keep]``, when it is known already; only read with ``bias``.
    """

    x: Tensor
    kept: Tensor
    fused: bool = False
    size: Tensor | None = None
    into: Callable[[], Tensor] | None = None
    bias: bool = False
    scores: Callable[[], Tensor] | None = None
    log_size: Tensor | None = None
