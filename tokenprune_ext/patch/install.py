"""Put plans into the blocks of a model and take them out again, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import adapter_of, unsupported
from .block import PLAN, BlockPlan, PrunedBlock
from .host import Host, UnsupportedModelError
from .mixin import dense_class, mixed_class

_RECORD = "_tokenprune_record"


def inspect_host(model: nn.Module) -> Host:
    """Check that a model, patched or not, is one that is understood, and read its geometry. Changes nothing.

    Raises:
        UnsupportedModelError: it is not; the message names the part that is unknown.
    """
    adapter = adapter_of(model)
    try:
        if record_of(model) is None:
            for name in vars(adapter.mixin or object):
                if name in vars(model):
                    raise unsupported(name, "a function set on this instance by other software")
        return adapter.inspect(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. Supported: {adapter.supported}") from None


def install(model: nn.Module, plans: Mapping[int, BlockPlan], record: object) -> None:
    """Turn the blocks named by ``plans`` into pruning blocks, and keep ``record`` on the model.

    The model must have passed :func:`inspect_host`. Replaces an earlier patch.

    Raises:
        UnsupportedModelError: a block has forward hooks that would not run. Nothing is changed then.
    """
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    for index in plans:
        reason = adapter.unpatchable(blocks[index])
        if reason:
            raise unsupported(f"block {index}", reason)
    uninstall(model)
    for index, plan in plans.items():
        block: Any = blocks[index]
        block.__class__ = mixed_class(PrunedBlock, type(block))
        setattr(block, PLAN, plan)
    if plans and adapter.mixin is not None:
        model.__class__ = mixed_class(adapter.mixin, type(model))
    setattr(model, _RECORD, record)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install` exactly; does nothing to a model that is not patched."""
    if record_of(model) is None:
        return
    adapter = adapter_of(model)
    for block in adapter.blocks(model):
        if isinstance(block, PrunedBlock):
            block.__class__ = dense_class(type(block))  # type: ignore[assignment]
            delattr(block, PLAN)
    model.__class__ = dense_class(type(model))
    delattr(model, _RECORD)


def record_of(model: nn.Module) -> Any:
    """What :func:`install` was given as ``record``; None for a model that is not patched."""
    return vars(model).get(_RECORD)
