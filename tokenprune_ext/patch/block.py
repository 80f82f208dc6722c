"""A transformer block that removes tokens: any known block, taken apart where its family says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .adapter import HostAdapter
from .context import AttentionContext, Reduced
from .host import Host
from .mixin import Mixin
from .projection import Projected
from .sources import compose, landing_positions, record
from .state import TokenState, log_size

PLAN = "_tokenprune_plan"


class TokenMethod(Protocol):
    """What a pruning block asks of a method (see ``tokenprune_ext.methods.Method``)."""

    name: ClassVar[str]

    @property
    def where(self) -> Literal["attention", "block"]: ...

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced: ...

    def min_keep(self, entering: int) -> int: ...


@dataclass(frozen=True)
class BlockPlan:
    """What one patched block does.

    Attributes:
        adapter: the family of the model.
        host: its geometry.
        method: how tokens are chosen.
        layer: 0-based index of the block.
        num_patches: patch tokens that come in, for an image of the host's input size.
        keep: patch tokens that leave; equal to ``num_patches`` where nothing is pruned.
        queries: only the first so many tokens are computed and leave (the last block, when the head reads only
            those, unless the full grid is asked for); None for all.
        learned: the part of the model that the method was trained to choose by, here; None for nothing.
    """

    adapter: HostAdapter
    host: Host
    method: TokenMethod
    layer: int
    num_patches: int
    keep: int
    queries: int | None = None
    learned: nn.Module | None = None


class PrunedBlock(Mixin):
    """Mixin in front of a block's own class; blocks change their class to one of these when they are patched.

    Everything of the dense block is computed as the model does it; queries, keys and values are computed once and
    shared with the method. No module, parameter, buffer or hook is added.
    """

    _tokenprune_plan: BlockPlan

    def forward(self, x: Tensor | TokenState, *args: Any, **kwargs: Any) -> TokenState | Tensor:
        """Tokens ``[B, N, C]`` or a state in, fewer of them out.

        Raises:
            ValueError: a mask was given, the number of tokens is not the one the schedule was made for, or the block
                is checkpointed with reentrant autograd.
        """
        plan = self._tokenprune_plan
        call = plan.adapter.call_arguments(*args, **kwargs)
        if isinstance(x, tuple) and not isinstance(x, TokenState):
            raise ValueError("a pruned model is checkpointed with use_reentrant=False: the other kind loses gradients")
        state = x if isinstance(x, TokenState) else TokenState(x)
        keep = _keep_count(plan, state.x.shape[1])
        state = _run(plan, self, state, keep, call)
        last = plan.layer == plan.host.depth - 1 and state.source is None
        return state.x if last else state.handed_on()


def _keep_count(plan: BlockPlan, tokens: int) -> int:
    """Patch tokens that leave, for the tokens that came in."""
    patches = tokens - plan.host.num_prefix_tokens
    if patches == plan.num_patches:
        return plan.keep
    if plan.host.dynamic and patches > 0:
        return min(patches, max(plan.method.min_keep(patches), plan.keep * patches // plan.num_patches))
    prefix = plan.host.num_prefix_tokens
    height, width = plan.host.input_size
    raise ValueError(
        f"block {plan.layer} got {tokens} tokens and expects {prefix + plan.num_patches} ({prefix} prefix + "
        f"{plan.num_patches} patch): the schedule was made for {height} x {width} images; apply it again for another "
        "input size"
    )


def _run(plan: BlockPlan, block: nn.Module, state: TokenState, keep: int, call: dict[str, Any]) -> TokenState:
    adapter, prefix = plan.adapter, plan.host.num_prefix_tokens
    x = state.x
    tokens = x.shape[1]
    queries = tokens if plan.queries is None or state.source is not None else plan.queries
    where = plan.method.where if plan.queries is None and keep < tokens - prefix else None
    projected = adapter.project(block, x, queries, state.position, **call)
    heads = adapter.attend(block, projected, state.bias)
    x = adapter.add_attention(block, x if queries == tokens else x[:, :queries], heads)
    if where == "attention":
        state = _reduce(plan, state, x, projected, keep)
        x = state.x
    x = adapter.add_mlp(block, x)
    return _reduce(plan, state, x, projected, keep) if where == "block" else TokenState(x, *state[1:])


def _reduce(plan: BlockPlan, state: TokenState, x: Tensor, projected: Projected, keep: int) -> TokenState:
    host = plan.host
    q, k, v, bias = projected.q, projected.k, projected.v, projected.bias
    if state.bias is not None:
        bias = state.bias if bias is None else bias + state.bias
    traced = torch.compiler.is_compiling()
    if traced or torch.is_grad_enabled():
        q, k, v, bias = q.detach(), k.detach(), v.detach(), None if bias is None else bias.detach()
    context = AttentionContext(
        x=x,
        q=q,
        k=k,
        v=v,
        scale=projected.scale,
        num_prefix=host.num_prefix_tokens,
        has_class_token=host.has_class_token,
        layer=plan.layer,
        depth=host.depth,
        size=state.size,
        bias=bias,
        learned=plan.learned,
    )
    prefix, patches = host.num_prefix_tokens, context.num_patches
    if traced or not torch._C._autograd._profiler_enabled():
        reduced = plan.method.reduce(context, keep)
    else:  # a range in torch's profiler, and through its emit_nvtx in Nsight
        with record_function(f"tokenprune {plan.method.name}, block {plan.layer}: {patches} -> {keep} patches"):
            reduced = plan.method.reduce(context, keep)
    if not traced:  # a compiled graph has no side effects
        record(plan.layer, reduced, prefix, patches)
    source = state.source
    if source is not None:
        source = compose(source, landing_positions(reduced, prefix, patches))
    return TokenState(
        x=reduced.x,
        size=reduced.size,
        bias=_log_size(reduced, projected.q.dtype) if reduced.bias else None,
        position=_positions(state.position, reduced, host, patches) if host.positional else None,
        source=source,
    )


def _log_size(reduced: Reduced, dtype: torch.dtype) -> Tensor | None:
    known = reduced.log_size
    if known is None:
        return None if reduced.size is None else log_size(reduced.size, dtype)
    return known if known.dtype == dtype else known.to(dtype)


def _positions(position: Tensor | None, reduced: Reduced, host: Host, patches: int) -> Tensor:
    """Where the tokens that leave are; a fused token is at the place of the middle one of those it stands for.

    That needs no width of the grid, which differs from image to image on a ``dynamic`` host, and unlike the centre it
    is the place of one of them.
    """
    kept = reduced.kept - host.num_prefix_tokens
    if position is None:
        position = torch.arange(patches, device=kept.device).expand(kept.shape[0], -1)
    staying = position.gather(1, kept)
    if not reduced.fused:
        return staying
    gone = torch.ones_like(position).scatter(1, kept, 0)
    middle = (gone.cumsum(1) <= (patches - kept.shape[1] - 1) // 2).sum(1, keepdim=True)
    return torch.cat([staying, position.gather(1, middle)], 1)
