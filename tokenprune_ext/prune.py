"""Put a method into a model, take it out again, and say what it does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .environment import device_name
from .macs import block_costs, blocks_macs, outside_macs
from .methods import Dense, Method
from .patch import BlockPlan, Host, adapter_of, inspect_host, install, record_of, uninstall
from .patch.sources import recording, standing
from .schedule import Schedule

_log = logging.getLogger(__name__)


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
    prune are not touched; a layer that keeps every token does not prune. How many layers do is logged (level INFO of
    the logger ``tokenprune_ext``); a method under which none does is warned about, and so is a schedule that was made
    on another device.

    Args:
        model: a supported model (see ``UnsupportedModelError`` for what is).
        method: a method, the registered name of one, or a schedule. With a schedule, the other arguments stay None.
        layers: 0-based indices of the blocks that prune, ascending; the method's own choice by default.
        keep: a keep ratio in (0, 1] for every pruning layer; or one entry a layer, each a float (ratio of the patch
            tokens that enter the layer) or an int (patch tokens that leave it).
        macs: target as a fraction in (0, 1] of the dense model's MACs in the blocks, with the MACs of choosing and
            merging tokens charged; the method's largest plan (for most: one common keep ratio) within it is taken.

    Raises:
        UnsupportedModelError: the model is not understood.
        TypeError: an argument of the wrong type.
        ValueError: a value that is not allowed, a target out of reach, a schedule made for another model, or a model
            without the trained parts that the method needs.
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
    install(model, _plans(schedule, host, model), schedule)
    _report(schedule, host, model)
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
    """One forward of a pruned model, and what its pruning layers did.

    Attributes:
        output: what the model returned.
        sources: pruning layer -> int64 ``[B, n0]``: for every original patch, the 0-based position, among the patch
            tokens that leave the layer, of the token that stands for it, or -1 for none.
        kept: pruning layer -> bool ``[B, n0]``: whether the patch's own token leaves the layer; it may stand for others
            that were merged into it.
        counts: pruning layer -> int64 ``[B]``: how many patch tokens of each image leave the layer, a fused one among
            them, padding not. All are the schedule's count, unless the method lets the image decide (``ats``).
        scores: pruning layer -> ``[B, n0]``, floating: for every original patch, the score of the token that stood for
            it when the layer ranked its tokens; the highest stay. NaN where there was none. Layers of methods that do
            not rank (``tome``) are left out.
    """

    output: Tensor
    sources: dict[int, Tensor]
    kept: dict[int, Tensor]
    counts: dict[int, Tensor]
    scores: dict[int, Tensor]


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a pruned model on images ``[B, 3, H, W]``, without gradients, and record what every pruning layer did.

    Layers that keep every token are not in the result. Runs uncompiled also when the model is compiled in place.

    Raises:
        ValueError: the model is not patched, or the images have another size than its schedule.
    """
    schedule_of(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recording() as found:
        output = model(images)
    counts = {layer: standing(source) for layer, source in found.sources.items()}
    return Trace(output, found.sources, found.kept, counts, found.scores)


@dataclass(frozen=True)
class LayerReport:
    """One block: tokens that enter and leave it (prefix included), its MACs, those of choosing, the dense block's."""

    block: int
    tokens_in: int
    tokens_out: int
    macs: int
    scoring_macs: int
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
        scoring_macs: MACs of choosing and merging tokens. A budget (``apply(macs=...)``) includes them.
        dense_blocks_macs: the same without pruning.
        class_token_only: whether the last block computes the tokens that the classifier reads alone.
        model_macs: MACs of the whole model, with patch embedding, pooling and classifier; scoring left out.
        dense_model_macs: the same without pruning.
    """

    model: str
    input_size: tuple[int, int]
    method: str | None
    layers: tuple[LayerReport, ...]
    blocks_macs: int
    scoring_macs: int
    dense_blocks_macs: int
    class_token_only: bool
    model_macs: int
    dense_model_macs: int

    def __str__(self) -> str:
        height, width = self.input_size
        last = self.layers[-1].block if self.class_token_only else None
        pruning = [layer.block for layer in self.layers if layer.tokens_out < layer.tokens_in and layer.block != last]
        what = "dense" if self.method is None else f"{self.method}, " + (
            f"pruning at blocks {', '.join(map(str, pruning))}" if pruning else "pruning nothing"
        )  # fmt: skip
        if self.class_token_only:
            what += ", the last block for the class token alone"
        lines = [f"{self.model} at {height} x {width}: {what}", "block       tokens      MMACs  scoring  of dense"]
        for layer in self.layers:
            change = layer.tokens_out < layer.tokens_in
            tokens = f"{layer.tokens_in} -> {layer.tokens_out}" if change else f"{layer.tokens_in}"
            share = (layer.macs + layer.scoring_macs) / layer.dense_macs
            macs, scoring = layer.macs / 1e6, layer.scoring_macs / 1e6
            lines.append(f"{layer.block:5d}  {tokens:>11}  {macs:9.1f}  {scoring:7.1f}  {share:8.1%}")
        for name, macs, dense in (
            ("blocks", self.blocks_macs, self.dense_blocks_macs),
            ("with scoring", self.blocks_macs + self.scoring_macs, self.dense_blocks_macs),
            ("model, with scoring", self.model_macs + self.scoring_macs, self.dense_model_macs),
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
    method = Dense() if schedule is None else schedule.build_method()
    costs = block_costs(model)
    pruned, dense = (blocks_macs(costs, host, counts, how) for counts, how in ((keep, method), ({}, Dense())))
    reports = []
    prefix, tokens = host.num_prefix_tokens, host.num_prefix_tokens + host.num_patches
    for block, ((macs, scoring), (dense_macs, _)) in enumerate(zip(pruned, dense, strict=True)):
        after = prefix + keep[block] if block in keep else tokens
        if method.class_token_only and block == host.depth - 1:
            after = host.head_tokens or tokens
        reports.append(LayerReport(block, tokens, after, macs, scoring, dense_macs))
        tokens = after
    total, dense_total = (sum(layer.macs for layer in reports), sum(layer.dense_macs for layer in reports))
    scoring_total = sum(layer.scoring_macs for layer in reports)
    return Description(
        model=host.model,
        input_size=host.input_size,
        method=None if schedule is None else schedule.method,
        layers=tuple(reports),
        blocks_macs=total,
        scoring_macs=scoring_total,
        dense_blocks_macs=dense_total,
        class_token_only=method.class_token_only,
        model_macs=total + outside_macs(model, tokens),
        dense_model_macs=dense_total + outside_macs(model, prefix + host.num_patches),
    )


def _report(schedule: Schedule, host: Host, model: nn.Module) -> None:
    """Say what a schedule does to a model; warn when that is nothing, or was measured elsewhere."""
    pruning = schedule.pruning()
    leaving = min(schedule.keep.values(), default=host.num_patches)
    _log.info(
        "%s: %s prunes at %d of %d blocks (%s), %d of %d patch tokens leave the last of them",
        *(host.model, schedule.method, len(pruning), host.depth, ", ".join(map(str, pruning)) or "none"),
        *(leaving, host.num_patches),
    )
    if schedule.keep and not pruning:
        kept = f"every layer keeps all {host.num_patches} patch tokens"
        warnings.warn(f"{schedule.method} prunes nothing: {kept}", stacklevel=3)
    made_on, parameter = schedule.origin.get("device"), next(model.parameters(), None)
    if made_on is not None and parameter is not None and not parameter.is_meta:
        here = device_name(parameter.device)
        if made_on != here:
            warnings.warn(f"the schedule was made on {made_on!r}, and the model is on {here!r}", stacklevel=3)


def _plans(schedule: Schedule, host: Host, model: nn.Module) -> dict[int, BlockPlan]:
    """One plan for every block that has something to do: prune, carry on what pruning made, or compute less."""
    method, adapter = schedule.build_method(), adapter_of(model)
    pruning = schedule.pruning()
    carries = bool(pruning) and (method.carries_size or host.positional)
    plans = {}
    patches = host.num_patches
    for layer in range(host.depth):
        keep = schedule.keep.get(layer, patches)
        queries = host.head_tokens if method.class_token_only and layer == host.depth - 1 else None
        if layer in pruning or queries is not None or (carries and layer > min(pruning)):
            learned = method.learned(model, layer) if layer in pruning else None
            plans[layer] = BlockPlan(adapter, host, method, layer, patches, keep, queries, learned)
        patches = keep
    return plans
