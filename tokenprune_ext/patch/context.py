"""The interface between a pruning block and a method: what it may look at, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """The attention of one block, for one forward. Carries no gradient: which tokens stay is not differentiable.

    The attention matrix is not part of it, and no method forms it: ``ops.attn_colsum_qk`` and ``ops.wpr_qk`` score from
    ``q`` and ``k``.

    When methods that merge tokens come, the number of patches each token stands for (``[B, N]``) belongs here and in
    :class:`Reduced`.

    Attributes:
        q: queries ``[B, H, N, d]``, after the query norm, not scaled.
        k: keys ``[B, H, N, d]``, after the key norm.
        v: values ``[B, H, N, d]``.
        scale: factor of the logits, ``softmax(q k^T * scale)``.
        num_prefix: tokens in front of the patch tokens; may be 0.
        has_class_token: whether token 0 is a class token.
        layer: 0-based index of the block.
        depth: number of blocks of the model.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    num_prefix: int
    has_class_token: bool
    layer: int
    depth: int

    def class_attention(self) -> Tensor:
        """Attention of the class token to every token ``[B, H, N]``, float32 (float64 for float64); O(N) memory.

        Raises:
            ValueError: the model has no class token.
        """
        if not self.has_class_token:
            raise ValueError("class_attention needs a class token, and this model has none")
        logits = (self.q[:, :, :1] * self.scale) @ self.k.transpose(-2, -1)
        return torch.softmax(logits.squeeze(2), dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Reduced:
    """The tokens a pruning layer lets through.

    Attributes:
        x: prefix tokens, kept patch tokens in their original order, then the fused token if there is one;
            ``[B, num_prefix + keep, C]``.
        index: positions of the kept patch tokens among the tokens that came in, ascending; int64 ``[B, kept]``.
        fused: whether the last token stands for every token that was not kept.
    """

    x: Tensor
    index: Tensor
    fused: bool
