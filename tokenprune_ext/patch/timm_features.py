"""Feature maps of a pruned timm model, for dense tasks: behind every block the full grid of patches."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from timm.models._features import feature_take_indices
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import PrunedBlock
from .grid import full_grid
from .mixin import Mixin
from .state import TokenState


class FullGridFeatures(Mixin):
    """Mixin in front of a timm transformer's own class, while some of its blocks are patched.

    ``get_intermediate_layers`` and timm's ``FeatureGetterNet`` build on ``forward_intermediates``.
    """

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's ``forward_intermediates``: the same arguments, and results of the same shapes.

        In every intermediate a patch has the token that stands for it behind that block; a dropped one has its last
        value, that in front of the block that dropped it. The final features are the tokens that are left, as
        ``forward_features`` returns them, but never the class token alone.

        Raises:
            ValueError: unknown ``output_fmt``, or a mask was given.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        model: Any = self
        prefix = model.num_prefix_tokens
        take, last = feature_take_indices(len(model.blocks), indices)
        plan = next(block._tokenprune_plan for block in model.blocks if isinstance(block, PrunedBlock))
        plan.adapter.call_arguments(attn_mask=attn_mask, is_causal=is_causal)  # refuses both
        grids, state = _run_blocks(model, x, set(take), last if stop_early else len(model.blocks) - 1)
        if norm:
            grids = [model.norm(grid) for grid in grids]
        features = [grid[:, prefix:] for grid in grids]
        prefixes = [grid[:, :prefix] for grid in grids] if prefix and return_prefix_tokens else None
        if output_fmt == "NCHW":
            rows, columns = model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            features = [part.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for part in features]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": features}
            if prefixes is not None:
                found["image_intermediates_prefix"] = prefixes
            return found if intermediates_only else {**found, "image_features": model.norm(state.x)}
        intermediates: list[Any] = features if prefixes is None else list(zip(features, prefixes, strict=True))
        return intermediates if intermediates_only else (model.norm(state.x), intermediates)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a schedule names blocks by their number."""
        raise ValueError(
            "prune_intermediate_layers would cut blocks off that the schedule speaks of: cut them before "
            "tokenprune_ext.apply, or give FeatureGetterNet prune=False"
        )


def _run_blocks(model: Any, images: Tensor, take: set[int], last: int) -> tuple[list[Tensor], TokenState]:
    """Run the blocks up to ``last``: all tokens ``[B, P + n0, C]`` behind those in ``take``, and the last state."""
    prefix = model.num_prefix_tokens
    tokens, calls = embed(model, images)
    latest = tokens[:, prefix:]  # of every patch, the value it had when it was last there
    places = torch.arange(latest.shape[1], device=latest.device)
    state = TokenState(tokens, source=places.expand(latest.shape[:2]))
    grids = []
    for index, block in enumerate(model.blocks[: last + 1]):
        before, state = state, _run_block(block, state, calls[index], model.grad_checkpointing)
        if state.x.shape[1] < before.x.shape[1]:
            latest = _restored(before, prefix, latest)
        if index in take:
            grids.append(torch.cat([state.x[:, :prefix], _restored(state, prefix, latest)], 1))
    return grids, state


def embed(model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The tokens ``[B, N, C]`` that enter the first block, and what every block is handed beside them, as timm does."""
    depth = len(model.blocks)
    x = model.patch_embed(images)
    if isinstance(model, Beit):
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x if model.pos_embed is None else x + model.pos_embed
        bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return model.pos_drop(x), [{"shared_rel_pos_bias": bias}] * depth
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        ropes = rope if rope is not None and getattr(model, "rope_mixed", False) else [rope] * depth
        norm_pre = getattr(model, "norm_pre", None)  # older timm has none
        return x if norm_pre is None else norm_pre(x), [{"rope": own} for own in ropes]
    return model.norm_pre(model.patch_drop(model._pos_embed(x))), [{}] * depth


def _run_block(block: nn.Module, state: TokenState, call: dict[str, Any], checkpointing: bool) -> TokenState:
    given: Any = state if isinstance(block, PrunedBlock) else state.x
    out = checkpoint(block, given, use_reentrant=False, **call) if checkpointing else block(given, **call)
    return out if isinstance(out, TokenState) else state._replace(x=out)


def _restored(state: TokenState, prefix: int, latest: Tensor) -> Tensor:
    assert state.source is not None
    return full_grid(state.x, state.source, prefix, latest)
