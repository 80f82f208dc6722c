"""Modules that change their class while they are patched, and are copied and pickled all the same."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Mixin(nn.Module):
    """Goes in front of a module's own class. A subclass may replace functions.

    Class attributes:
        prefix: of the name of the class that is made.
    """

    prefix: ClassVar[str] = "Pruned"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so a copy is told how to make it again."""
        return _new, type(self).__bases__, self.__dict__


_classes: dict[tuple[type[Mixin], type[nn.Module]], type[Mixin]] = {}


def mixed_class(mixin: type[Mixin], dense: type[nn.Module]) -> type[Mixin]:
    """The class of a patched module, from the class of the dense one; always the same one."""
    if (mixin, dense) not in _classes:
        _classes[mixin, dense] = type(f"{mixin.prefix}{dense.__name__}", (mixin, dense), {"__module__": __name__})
    return _classes[mixin, dense]


def dense_class(kind: type) -> type[nn.Module]:
    """The class a patched module had before; that of any other module is its own."""
    return kind.__bases__[1] if issubclass(kind, Mixin) else kind


def _new(mixin: type[Mixin], dense: type[nn.Module]) -> nn.Module:
    kind = mixed_class(mixin, dense)
    return kind.__new__(kind)
