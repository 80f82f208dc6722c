"""What a pruning method is, and the registry that finds one by name."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.patch.context import AttentionContext, Reduced
from tokenprune_ext.patch.host import Host


@dataclass(frozen=True)
class Method(ABC):
    """One way to choose which patch tokens stay. Its options are the fields of the frozen dataclass.

    A subclass gives ``name``, ``default_layers`` and ``scores``, and checks its options in ``__post_init__``. The rest
    has defaults that most methods keep.

    Class attributes:
        name: the name it is registered under.
        where: tokens leave between attention and MLP (``attention``) or after the MLP (``block``).
        fuse: what becomes of the tokens that are not kept: ``none``, or ``mean`` for one token behind the kept ones.
    """

    name: ClassVar[str]
    where: ClassVar[Literal["attention", "block"]] = "attention"
    fuse: ClassVar[Literal["none", "mean"]] = "none"

    @abstractmethod
    def default_layers(self, depth: int) -> tuple[int, ...]:
        """0-based indices of the blocks that prune, for a model of ``depth`` blocks, ascending."""

    @abstractmethod
    def scores(self, ctx: AttentionContext) -> Tensor:
        """One score a token, ``[B, N]``, floating; the highest stay. Entries of prefix tokens are ignored."""

    def check_host(self, host: Host) -> None:  # noqa: B027 - most methods work on every model
        """Raises ValueError when the method, with its options, cannot work on a model."""

    def reduce(self, x: Tensor, ctx: AttentionContext, keep: int) -> Reduced:
        """Tokens ``[B, N, C]`` -> ``[B, num_prefix + keep, C]``; a fused token is one of the ``keep``."""
        fused = self.fuse != "none"
        tokens, index = ops.topk_gather(x, self.scores(ctx), keep - fused, ctx.num_prefix, self.fuse)
        return Reduced(tokens, index, fused)

    @property
    def min_keep(self) -> int:
        """The fewest patch tokens that can leave a layer that prunes."""
        return 1 if self.fuse == "none" else 2

    def keep_count(self, ratio: float, num_patches: int) -> int:
        """Patch tokens that leave a layer at a keep ratio: rounded down, where float error does not count."""
        return math.floor(ratio * num_patches + 1e-9)

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


def available() -> tuple[str, ...]:
    """Names of the registered methods, sorted."""
    return tuple(sorted(_registry))


def create(name: str, /, **options: Any) -> Method:
    """The method registered under ``name``.

    Raises:
        ValueError: no such method, no such option, or a value that is not allowed.
        TypeError: a value of the wrong type.
    """
    if name not in _registry:
        raise ValueError(f"unknown method {name!r}; available: {', '.join(available())}")
    cls = _registry[name]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"method {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
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
