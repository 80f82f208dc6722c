"""What a schedule search varies: how much each block removes relative to the others, and options of the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tokenprune_ext import methods
from tokenprune_ext.counts import checked_layers, largest
from tokenprune_ext.methods import Method
from tokenprune_ext.methods.base import scaled_layers
from tokenprune_ext.patch import Host, inspect_host
from tokenprune_ext.schedule import Schedule, default_layers

Cost = Callable[[Mapping[int, int], Method], float]
"""Share of the dense model that a method costs with given keep counts."""


@dataclass(frozen=True)
class Space:
    """Schedules of one method for one model.

    A schedule is a direction and a budget. Block l keeps ``strength ** direction[l]`` of the patch tokens that enter
    it; blocks with a direction of 0 or less do not prune. The strength is the mildest that meets the budget, so that
    every point of the space costs what was asked for and a search has to find the direction alone.

    Attributes:
        host: geometry of the model.
        method: the method, with the options that are not varied.
        layers: 0-based blocks that may prune, ascending.
        tune: options to vary, and the values to choose from.
    """

    host: Host
    method: Method
    layers: tuple[int, ...]
    tune: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: Method,
        layers: Sequence[int] | None = None,
        tune: Mapping[str, Sequence[Any]] | None = None,
    ) -> Space:
        """The space of a method for a model; by default any block may prune whose MLP or successor gains by it.

        Raises:
            UnsupportedModelError: the model is not understood.
            ValueError: the method does not suit the model or has nothing to vary; a layer or an option that is not
                there; a value that the option does not take.
        """
        host = inspect_host(model)
        method = method.for_host(host)
        last = host.depth - 1
        if not default_layers(method, host):
            raise ValueError(f"{method.name} prunes nothing: there is nothing to search")
        if layers is None:
            layers = range(last)
        chosen = checked_layers(list(layers), host.depth)
        if method.class_token_only and last in chosen:
            raise ValueError(f"layers has {last}, which computes the class token alone and must not prune")
        values = {name: tuple(choices) for name, choices in (tune or {}).items()}
        for name, choices in values.items():
            if len(choices) < 2:
                raise ValueError(f"tune has {len(choices)} value for {name}: give at least two")
            for choice in choices:
                methods.create(method.name, **{**method.options(), name: choice}).check_host(host)
        method.check_host(host)
        return cls(host, method, chosen, values)

    def variant(self, options: Mapping[str, Any]) -> Method:
        """The method with some of its tuned options set."""
        return methods.create(self.method.name, **{**self.method.options(), **options})

    def schedule(self, direction: Mapping[int, float], method: Method, budget: float, cost: Cost) -> Schedule | None:
        """The mildest schedule along a direction that costs at most ``budget`` of the dense model; None for none."""
        counts = self.plan(direction, method, budget, cost)
        if counts is None:
            return None
        return Schedule(
            model=self.host.model,
            input_size=self.host.input_size,
            num_prefix_tokens=self.host.num_prefix_tokens,
            num_patches=self.host.num_patches,
            method=method.name,
            options=method.options(),
            keep=counts,
        )

    def plan(self, direction: Mapping[int, float], method: Method, budget: float, cost: Cost) -> dict[int, int] | None:
        """Keep counts of the mildest schedule along a direction within the budget."""
        pruning = {layer: weight for layer, weight in direction.items() if weight > 0}
        if not pruning:
            return None
        largest_weight = max(pruning.values())  # of a direction only the proportions count

        def at(strength: float) -> dict[int, int]:
            counts, entering = {}, self.host.num_patches
            for layer, weight in pruning.items():
                least = min(entering, method.min_keep(entering))
                kept = max(least, method.keep_count(strength ** (weight / largest_weight), entering))
                if kept < entering:
                    counts[layer] = entering = kept
            return counts

        def holds(strength: float) -> bool:
            return cost(at(strength), method) <= budget

        return at(largest(holds)) if holds(1.0) or holds(0.0) else None

    def uniform(self) -> dict[str, dict[int, float]]:
        """Directions a person would try: the same ratio at some usual sets of blocks."""
        depth, allowed = self.host.depth, set(self.layers)
        middle = range(depth // 4, max(depth * 11 // 12, depth // 4 + 1))
        sets = (
            default_layers(self.method, self.host),
            scaled_layers((3, 6, 9), depth),
            scaled_layers((2, 5, 8), depth),
            tuple(middle),
            tuple(middle)[::2],
            (depth // 4,),
        )
        return {
            "uniform at " + ", ".join(map(str, layers)): dict.fromkeys(layers, 1.0)
            for layers in sets
            if layers and allowed.issuperset(layers)
        }
