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
        kept: layer -> bool ``[B, n0]``: whether the patch's own token leaves the layer; it may stand for others too.
        scores: layer -> ``[B, n0]``: for every original patch, what the token that stood for it was ranked by, or NaN.
            Only layers whose method ranks tokens.
    """

    sources: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
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
    found = _current.get()
    if found is None:
        return
    source, kept = landing_positions(reduced, num_prefix, num_patches), kept_mask(reduced, num_prefix, num_patches)
    scores = None if reduced.scores is None else reduced.scores().detach()[:, num_prefix:]
    if found.sources:
        before, kept_before = (next(reversed(maps.values())) for maps in (found.sources, found.kept))
        absent, place = before < 0, before.clamp(min=0)
        source = compose(before, source)
        kept = kept_before & kept.gather(1, place)
        scores = None if scores is None else scores.gather(1, place).masked_fill(absent, torch.nan)
    found.sources[layer], found.kept[layer] = source, kept
    if scores is not None:
        found.scores[layer] = scores


def kept_mask(reduced: Reduced, num_prefix: int, num_patches: int) -> Tensor:
    """Which patch tokens that came in leave themselves, bool ``[B, num_patches]``; padding does not."""
    kept, places = _places(reduced, num_prefix)
    return kept.new_zeros((kept.shape[0], num_patches), dtype=torch.bool).scatter(1, kept, places >= 0)


def landing_positions(reduced: Reduced, num_prefix: int, num_patches: int) -> Tensor:
    """Where every patch token that came in ended up among those that leave, ``[B, num_patches]``; -1 for nowhere."""
    kept, places = _places(reduced, num_prefix)
    batch, count = kept.shape
    landing = kept.new_full((batch, num_patches), count if reduced.fused else -1).scatter(1, kept, places)
    if reduced.into is None:
        return landing
    into = reduced.into()[:, num_prefix:] - num_prefix
    merged = torch.where(into < 0, -1, landing.gather(1, into.clamp(min=0)))
    return torch.where(landing < 0, merged, landing)


def _places(reduced: Reduced, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept patch tokens before and after, int64 ``[B, kept]``; -1 after, for padding."""
    kept = reduced.kept - num_prefix
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    if reduced.size is not None:  # padding stands for nothing
        places = torch.where(reduced.size[:, num_prefix:] > 0, places, -1)
    return kept, places


def compose(source: Tensor, landing: Tensor) -> Tensor:
    """The source map behind a layer, from the map in front of it ``[B, n0]`` and the layer's own ``[B, n]``."""
    return torch.where(source < 0, source, landing.gather(1, source.clamp(min=0)))


def standing(source: Tensor) -> Tensor:
    """How many tokens stand for patches in a source map ``[B, n0]``: int64 ``[B]``."""
    seen = source.new_zeros((source.shape[0], source.shape[1] + 1)).scatter(1, source + 1, 1)
    return seen[:, 1:].sum(1)
