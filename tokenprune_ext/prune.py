"""Put a method into a model, take it out again, and say what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .macs import block_costs, blocks_macs, outside_macs
from .methods import Method
from .patch import Host, PruningStep, inspect_host, install, record_of, uninstall
from .patch.sources import recording
from .schedule import Schedule


def apply(
    model: nn.Module,
    method: Method | str | Schedule,
    *,
    layers: Sequence[int] | None = None,
    keep: float | Sequence[float | int] | None = None,
    macs: float | None = None,
) -> nn.Module:
    """Make a model prune tokens. The model is changed in place and returned; applying again replaces.

    Weights, state dict keys, deepcopy, pickle, train and eval, devices and dtypes are as before. Blocks that do not
    prune are not touched; a layer that keeps every token does not prune.

    Args:
        model: a supported model (see ``UnsupportedModelError`` for what is).
        method: a method, the registered name of one, or a schedule. With a schedule, the other arguments stay None.
        layers: 0-based indices of the blocks that prune, ascending; the method's own choice by default.
        keep: a keep ratio in (0, 1] for every pruning layer; or one entry a layer, each a float (ratio of the patch
            tokens that enter the layer) or an int (patch tokens that leave it).
        macs: target as a fraction in (0, 1] of the dense model's MACs in the blocks; one common keep ratio is solved
            for, the largest that does not exceed the target.

    Raises:
        UnsupportedModelError: the model is not understood.
        TypeError: an argument of the wrong type.
        ValueError: a value that is not allowed, a target out of reach, or a schedule made for another model.
        In every case the model is left as it was.
    """
    if isinstance(method, Schedule):
        if not layers is keep is macs is None:
            raise ValueError("layers, keep and macs are part of the schedule and must not be given with one")
        schedule = method
    else:
        schedule = Schedule.build(model, method, layers=layers, keep=keep, macs=macs)
    host = inspect_host(model)
    schedule.check(host)
    install(model, _steps(schedule, host), schedule)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo :func:`apply` exactly; the same model is returned. Does nothing to a model that is not patched."""
    uninstall(model)
    return model


def schedule_of(model: nn.Module) -> Schedule:
    """The schedule a model was patched with.

    Raises:
        ValueError: the model is not patched, or its input size was changed afterwards.
    """
    schedule: Schedule | None = record_of(model)
    if schedule is None:
        raise ValueError("the model is not pruned: call tokenprune_ext.apply first")
    schedule.check(inspect_host(model))
    return schedule


@dataclass(frozen=True)
class Trace:
    """One forward of a pruned model with its source maps.

    Attributes:
        output: what the model returned.
        sources: pruning layer -> int64 ``[B, n0]``: for every original patch, the 0-based position, among the patch
            tokens that leave the layer, of the token that stands for it, or -1 for none.
    """

    output: Tensor
    sources: dict[int, Tensor]


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a pruned model on images ``[B, 3, H, W]``, without gradients, and record which token stands for which patch.

    Layers that keep every token are not in the result. Runs uncompiled also when the model is compiled in place.

    Raises:
        ValueError: the model is not patched, or the images have another size than its schedule.
    """
    schedule_of(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recording() as sources:
        output = model(images)
    return Trace(output, sources)


@dataclass(frozen=True)
class LayerReport:
    """One block: tokens that enter and leave it (prefix tokens included), and its MACs pruned and dense."""

    block: int
    tokens_in: int
    tokens_out: int
    macs: int
    dense_macs: int


@dataclass(frozen=True)
class Description:
    """What a model costs for one image; ``str()`` is a table.

    Attributes:
        model: architecture name.
        input_size: height and width in pixels.
        method: name of the pruning method; None for a dense model.
        layers: one report a block.
        blocks_macs: MACs of the blocks. Scoring is left out, as in the papers' tables.
        dense_blocks_macs: the same without pruning.
        model_macs: MACs of the whole model, with patch embedding, pooling and classifier.
        dense_model_macs: the same without pruning.
    """

    model: str
    input_size: tuple[int, int]
    method: str | None
    layers: tuple[LayerReport, ...]
    blocks_macs: int
    dense_blocks_macs: int
    model_macs: int
    dense_model_macs: int

    def __str__(self) -> str:
        height, width = self.input_size
        pruning = [layer.block for layer in self.layers if layer.tokens_out < layer.tokens_in]
        what = "dense" if self.method is None else f"{self.method}, " + (
            f"pruning at blocks {', '.join(map(str, pruning))}" if pruning else "pruning nothing"
        )  # fmt: skip
        lines = [f"{self.model} at {height} x {width}: {what}", "block       tokens      MMACs  of dense"]
        for layer in self.layers:
            tokens = f"{layer.tokens_in} -> {layer.tokens_out}" if layer.block in pruning else f"{layer.tokens_in}"
            lines.append(
                f"{layer.block:5d}  {tokens:>11}  {layer.macs / 1e6:9.1f}  {layer.macs / layer.dense_macs:8.1%}"
            )
        for name, macs, dense in (
            ("blocks", self.blocks_macs, self.dense_blocks_macs),
            ("model", self.model_macs, self.dense_model_macs),
        ):
            lines.append(f"{name}: {macs / 1e9:.3f} of {dense / 1e9:.3f} GMACs an image ({macs / dense:.1%})")
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """Tokens and MACs of every block of a supported model, patched or dense, next to the dense model's.

    Raises:
        UnsupportedModelError: the model is not understood.
        ValueError: its input size was changed after it was patched.
    """
    host = inspect_host(model)
    schedule = None if record_of(model) is None else schedule_of(model)
    keep = {} if schedule is None else schedule.keep
    where = "block" if schedule is None else schedule.build_method().where
    costs = block_costs(model)
    pruned, dense = (blocks_macs(costs, host, counts, where) for counts in (keep, {}))
    reports = []
    tokens = host.num_patches
    for block in range(host.depth):
        after = keep.get(block, tokens)
        prefix = host.num_prefix_tokens
        reports.append(LayerReport(block, prefix + tokens, prefix + after, pruned[block], dense[block]))
        tokens = after
    return Description(
        model=host.model,
        input_size=host.input_size,
        method=None if schedule is None else schedule.method,
        layers=tuple(reports),
        blocks_macs=sum(pruned),
        dense_blocks_macs=sum(dense),
        model_macs=sum(pruned) + outside_macs(model, tokens),
        dense_model_macs=sum(dense) + outside_macs(model, host.num_patches),
    )


def _steps(schedule: Schedule, host: Host) -> dict[int, PruningStep]:
    """One step for every layer that removes tokens."""
    method = schedule.build_method()
    entering = schedule.entering()
    return {
        layer: PruningStep(method, layer, entering[layer], count, host)
        for layer, count in schedule.keep.items()
        if count < entering[layer]
    }
