"""The usual pre-norm block with one linear layer for queries, keys and values: a family in ten lines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .adapter import HostAdapter, Parts, check_parts
from .host import Host
from .projection import Projected, fused_projection, passed


class QKVBlockAdapter(HostAdapter):
    """A family whose ``model.blocks`` compute, as DeiT's original code and what grew out of it (T2T-ViT, LV-ViT) do::

        x = x + drop_path(attn(norm1(x)))        # attn: qkv, num_heads, scale, proj; attn_drop and proj_drop if any
        x = x + drop_path(mlp(norm2(x)))

    A subclass gives ``supported``, ``matches`` and ``geometry``; where the sum is another one, ``residual``.

    Class attributes:
        block_parts: submodules of a block. Any other is refused, because it would be left out.
        attention_parts: submodules of its ``attn``.
    """

    block_parts: ClassVar[Parts] = Parts({"norm1", "attn", "norm2", "mlp"}, {"drop_path"})
    attention_parts: ClassVar[Parts] = Parts({"qkv", "proj"}, {"attn_drop", "proj_drop"})

    @abstractmethod
    def geometry(self, model: Any) -> Host:
        """Tokens and channels of a model of this family."""

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream with the output of one branch added."""
        drop = getattr(block, "drop_path", None)
        return x + (out if drop is None else passed(drop, out))

    def inspect(self, model: nn.Module) -> Host:
        for index, block in enumerate(self.blocks(model)):
            check_parts(f"blocks.{index}", block, self.block_parts)
            check_parts(f"blocks.{index}.attn", block.attn, self.attention_parts)  # type: ignore[arg-type]
        return self.geometry(model)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.blocks)

    def project(self, block: Any, x: Tensor, queries: int, position: Tensor | None, **call: Any) -> Projected:
        attn = block.attn
        q, k, v = fused_projection(block.norm1(x), attn.qkv, attn.num_heads, queries)
        drop = getattr(attn, "attn_drop", None)
        return Projected(q, k, v, attn.scale, dropout=drop.p if drop is not None and attn.training else 0.0)

    def add_attention(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        out = block.attn.proj(heads.transpose(1, 2).flatten(2))
        drop = getattr(block.attn, "proj_drop", None)
        return self.residual(block, x, out if drop is None else passed(drop, out))

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        return self.residual(block, x, block.mlp(block.norm2(x)))

    def unpatchable(self, block: Any) -> str | None:
        if block.attn._forward_hooks or block.attn._forward_pre_hooks:
            return "its attn has forward hooks, which a pruning block does not run"
        return None
