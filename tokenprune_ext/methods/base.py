"""What a pruning method is, and the registry that finds one by name."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import nn

from tokenprune_ext.checks import check_bool
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host

if TYPE_CHECKING:
    from tokenprune_ext.macs import BlockCost


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to have fewer tokens behind a block. Its options are the fields of the frozen dataclass.

    A subclass gives ``name``, ``default_layers``, ``reduce`` and ``scoring_macs``, and checks its options in
    ``__post_init__``; most start from :class:`~tokenprune_ext.methods.scored.ScoredMethod`, which asks for scores only.

    Args:
        class_token_only: in the last block, compute queries, attention output and MLP of the class token alone (of the
            tokens the classifier reads). Exact, for models whose classifier reads nothing else.

    Class attributes:
        name: the name it is registered under.
        needs_training: whether it works with parts that a model has only after it was trained for the method.
    """

    name: ClassVar[str]
    needs_training: ClassVar[bool] = False

    class_token_only: bool = False

    def __post_init__(self) -> None:
        check_bool("class_token_only", self.class_token_only)

    @abstractmethod
    def default_layers(self, depth: int) -> tuple[int, ...]:
        """0-based indices of the blocks that prune, for a model of ``depth`` blocks, ascending."""

    @abstractmethod
    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        """The tokens that leave a pruning layer: ``keep`` patch tokens, a fused one among them."""

    @abstractmethod
    def scoring_macs(self, cost: BlockCost, host: Host, layer: int, tokens: int, keep: int) -> int:
        """MACs of choosing and merging at block ``layer``, of this cost, for ``tokens`` tokens (prefix included)."""

    def for_host(self, host: Host) -> Method:
        """The method that a schedule for this model names: this one, unless it stands for a choice."""
        return self

    def check_host(self, host: Host) -> None:
        """Raises ValueError when the method, with its options, cannot work on a model."""
        if self.class_token_only and host.head_tokens is None:
            raise ValueError(
                f"class_token_only needs a model whose classifier reads the class token alone, and {host.model} reads "
                "the patch tokens too"
            )

    def learned(self, model: nn.Module, layer: int) -> nn.Module | None:
        """The submodule of a model that was trained for pruning at block ``layer``; it gets to ``ctx.learned``.

        Raises:
            ValueError: the model does not have it.
        """
        return None

    @property
    def where(self) -> Literal["attention", "block"]:
        """Where tokens leave: between attention and MLP, or behind the MLP."""
        return "attention"

    @property
    def carries_size(self) -> bool:
        """Whether blocks behind a pruning layer have to know how many patches each token stands for."""
        return False

    def min_keep(self, entering: int) -> int:
        """The fewest patch tokens that can leave a layer that ``entering`` enter."""
        return 1

    def keep_count(self, ratio: float, num_patches: int) -> int:
        """Patch tokens that leave a layer at a keep ratio: rounded down, where float error does not count."""
        return math.floor(ratio * num_patches + 1e-9)

    def plan(self, strength: float, layers: Sequence[int], num_patches: int) -> dict[int, int]:
        """Keep counts of all layers from one number in [0, 1]: 1 keeps everything, and more never costs less.

        The family of schedules among which a cost target chooses. Here: the same keep ratio at every layer.
        """
        counts = {}
        entering = num_patches
        for layer in layers:
            least = min(entering, self.min_keep(entering))
            counts[layer] = entering = min(entering, max(least, self.keep_count(strength, entering)))
        return counts

    def options(self) -> dict[str, Any]:
        """The options as plain values for JSON; ``create(method.name, **method.options())`` gives an equal method."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


MethodClass = TypeVar("MethodClass", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def register(cls: MethodClass) -> MethodClass:
    """Class decorator: make a method known under its ``name``.

    Raises:
        ValueError: another class has the name.
    """
    if _registry.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"method name {cls.name!r} is taken by {_registry[cls.name].__qualname__}")
    return cls


def available(*, trained: bool = False) -> tuple[str, ...]:
    """Names of the registered methods that work on any pretrained model, sorted; with ``trained``, of all."""
    return tuple(sorted(name for name, cls in _registry.items() if trained or not cls.needs_training))


def create(name: str, /, **options: Any) -> Method:
    """The method registered under ``name``.

    Raises:
        ValueError: no such method, no such option, or a value that is not allowed.
        TypeError: a value of the wrong type.
    """
    if name not in _registry:
        raise ValueError(f"unknown method {name!r}; available: {', '.join(available(trained=True))}")
    cls = _registry[name]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"method {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    return cls(**options)


def scaled_layers(boundaries: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block indices given for 12 blocks, moved to the same fractions of another depth; ascending, without repeats."""
    return tuple(sorted({boundary * depth // 12 for boundary in boundaries}))


def check_number(name: str, value: object, low: float, *, strict: bool = False) -> None:
    """An option that is a number from ``low`` on (above ``low`` when ``strict``)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and (value > low if strict else value >= low)):
        raise ValueError(f"{name} must be {'above' if strict else 'at least'} {low}, got {value}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
