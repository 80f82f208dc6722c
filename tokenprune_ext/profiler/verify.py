"""Whether a schedule is as fast as the profile said, in a run of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from torch import nn

from tokenprune_ext.compare import share
from tokenprune_ext.latency import time_in_turns
from tokenprune_ext.prune import apply

from .models import ModelTarget
from .result import BatchProfile
from .settings import Settings


def verify(model: nn.Module, settings: Settings, one: BatchProfile, *, budget_s: float = 10.0) -> dict[str, float]:
    """Time the dense model and the schedule of a choice in turn.

    Returns:
        Seconds of ``dense_s`` and ``schedule_s``; ``profile_dense_s`` and ``profile_schedule_s`` are the profile's.
        ``deviation`` is the schedule's share of the dense latency here over the same in the profile, less 1: what the
        machine as a whole is slower or faster by is not in it.

    Raises:
        ValueError: nothing was chosen, or the profile was not made of the deployed model.
    """
    if settings.mode != "deployed":
        raise ValueError(f"mode must be deployed for a schedule to be checked, got {settings.mode!r}")
    if one.choice is None or one.schedule is None:
        raise ValueError(f"batch {one.batch_size}: no schedule was chosen, so there is nothing to check")
    method, layer = settings.measured()
    target = ModelTarget(model, method, layer, graph=settings.cuda_graph, seed=settings.seed)
    images = target.images(one.batch_size)
    models = {"dense": model, "schedule": apply(share(model), one.schedule)}
    with target.on_device():
        calls: dict[str, Callable[[], object]] = {
            name: target.runnable(partial(net, images)) for name, net in models.items()
        }
        times = time_in_turns(calls, clock=target.clock, budget_s=budget_s)
    dense, pruned = (statistics.median(times[name]) for name in ("dense", "schedule"))
    choice = one.choice
    return {
        "dense_s": dense,
        "schedule_s": pruned,
        "profile_dense_s": choice.dense_latency_s,
        "profile_schedule_s": choice.latency_s,
        "deviation": (pruned / dense) / (choice.latency_s / choice.dense_latency_s) - 1,
    }
