"""Which token stands for which patch: recorded during one traced forward, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .context import Reduced

_sources: ContextVar[dict[int, Tensor] | None] = ContextVar("tokenprune_sources", default=None)


@contextmanager
def recording() -> Iterator[dict[int, Tensor]]:
    """Record the source map of every pruning layer run inside the ``with``.

    Yields:
        Per layer int64 ``[B, n0]``: for every original patch, the position among the patch tokens that leave the layer
        of the token that stands for it, or -1.
    """
    sources: dict[int, Tensor] = {}
    token = _sources.set(sources)
    try:
        yield sources
    finally:
        _sources.reset(token)


def record(layer: int, reduced: Reduced, num_prefix: int, num_patches: int) -> None:
    """Add one layer, through which ``num_patches`` patch tokens came in, to the recording in progress, if any."""
    if torch.compiler.is_compiling():  # a compiled graph has no side effects; tracing runs uncompiled
        return
    sources = _sources.get()
    if sources is None:
        return
    landing = landing_positions(reduced, num_prefix, num_patches)
    sources[layer] = compose(next(reversed(sources.values())), landing) if sources else landing


def landing_positions(reduced: Reduced, num_prefix: int, num_patches: int) -> Tensor:
    """Where every patch token that came in ended up among those that leave, ``[B, num_patches]``; -1 for nowhere."""
    kept = reduced.kept - num_prefix
    batch, count = kept.shape
    landing = kept.new_full((batch, num_patches), count if reduced.fused else -1)
    places = torch.arange(count, device=kept.device).expand(batch, -1)
    if reduced.size is not None:  # padding stands for nothing
        places = torch.where(reduced.size[:, num_prefix:] > 0, places, -1)
    landing = landing.scatter(1, kept, places)
    if reduced.into is None:
        return landing
    into = reduced.into()[:, num_prefix:] - num_prefix
    merged = torch.where(into < 0, -1, landing.gather(1, into.clamp(min=0)))
    return torch.where(landing < 0, merged, landing)


def compose(source: Tensor, landing: Tensor) -> Tensor:
    """The source map behind a layer, from the map in front of it ``[B, n0]`` and the layer's own ``[B, n]``."""
    return torch.where(source < 0, source, landing.gather(1, source.clamp(min=0)))
