"""Which token stands for which patch, and why: recorded during one traced forward, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .context import Reduced


@dataclass(frozen=True)
class Recording:
    """What every pruning layer of one forward did, in the order they ran.

    Attributes:
        sources: layer -> int64 ``[B, n0]``: for every original patch, the position among the patch tokens that leave
            the layer of the token that stands for it, or -1.
        scores: layer -> ``[B, n0]``: for every original patch, what the token that stood for it was ranked by, or NaN.
            Only layers whose method ranks tokens.
    """

    sources: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)


_current: ContextVar[Recording | None] = ContextVar("tokenprune_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the pruning layers that run inside the ``with``."""
    found = Recording()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def record(layer: int, reduced: Reduced, num_prefix: int, num_patches: int) -> None:
    """Add one layer, through which ``num_patches`` patch tokens came in, to the recording in progress, if any."""
    if torch.compiler.is_compiling():  # a compiled graph has no side effects; tracing runs uncompiled
        return
    found = _current.get()
    if found is None:
        return
    before = next(reversed(found.sources.values()), None)
    if reduced.scores is not None:
        scores = reduced.scores().detach()[:, num_prefix:]
        found.scores[layer] = scores if before is None else _of_patches(scores, before)
    landing = landing_positions(reduced, num_prefix, num_patches)
    found.sources[layer] = landing if before is None else compose(before, landing)


def _of_patches(scores: Tensor, source: Tensor) -> Tensor:
    """``[B, n]`` of the tokens as ``[B, n0]`` of the original patches, NaN where no token stands for one."""
    return torch.where(source < 0, torch.nan, scores.gather(1, source.clamp(min=0)))


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


def standing(source: Tensor) -> Tensor:
    """How many tokens stand for patches in a source map ``[B, n0]``: int64 ``[B]``."""
    seen = source.new_zeros((source.shape[0], source.shape[1] + 1)).scatter(1, source + 1, 1)
    return seen[:, 1:].sum(1)
