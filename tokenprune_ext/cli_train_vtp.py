"""`tokenprune train vtp`: sparsity training, removal of channels, fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_training import Session, session, training_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokenprune_ext.train import Objective
    from tokenprune_ext.vtp import AsFast

_SHARE = click.FloatRange(0, 1, max_open=True)
_OWN = ("rate", "by_latency", "latency_batch_size", "align", "finetune_epochs", "finetune_lr")


class _Align(click.ParamType[int | str]):
    name = "INTEGER|DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return int(value) if str(value).lstrip("-").isdigit() else str(value)


@click.command()
@click.option("--rate", type=float, help="Share of all channels to remove, in [0, 1).")
@click.option("--by-latency", type=float, metavar="SHARE", help="Instead: latency over the dense model's, measured.")
@click.option("--latency-batch-size", type=click.IntRange(1), default=1, help="Batch whose latency counts.")
@click.option(
    "--align", type=_Align(), default=1, help="Kept widths are multiples of it: 8, 16, 64, or a device's tile."
)
@click.option("--l1", type=click.FloatRange(0), default=1e-4, help="Weight of the sum of |gate|.")
@click.option("--gate-lr-scale", type=click.FloatRange(0), default=1.0, help="Learning rate of the gates over --lr.")
@click.option("--label-smoothing", type=_SHARE, default=0.0)
@click.option("--finetune-epochs", type=click.IntRange(0), help="Of the smaller model.  [default: as --epochs]")
@click.option(
    "--finetune-lr", type=click.FloatRange(0, min_open=True), help="Of the smaller model.  [default: as --lr]"
)
@training_options
def vtp(l1: float, gate_lr_scale: float, label_smoothing: float, **given: Any) -> None:
    """VTP: train with gates, remove channels, fine-tune.

    OUTPUT is the run with gates. What is removed goes by its name: OUTPUT/rate-0.4.safetensors, and fine-tuned
    OUTPUT/rate-0.4. The same command with another rate starts from the same gates.
    """
    asked = {name: given.pop(name) for name in _OWN}
    if (asked["rate"] is None) == (asked["by_latency"] is None):
        raise click.UsageError("give either --rate or --by-latency")

    def build(model: nn.Module) -> Objective:
        from tokenprune_ext.vtp.objective import SparsityObjective

        asked["align"] = _check(model, asked)
        return SparsityObjective(l1, gate_lr_scale, label_smoothing)

    with session(given) as this:
        model, objective, data, options = this.start(build)
        epochs, lr = asked.pop("finetune_epochs"), asked.pop("finetune_lr")
        with values.usage_error(ValueError):
            later = replace(options, epochs=epochs or options.epochs, lr=lr or options.lr)
        settings = {"method": "vtp", "l1": l1, "gate_lr_scale": gate_lr_scale, "label_smoothing": label_smoothing}
        gated = this.train(model, objective, data, options, given["output"], settings).model
        smaller, file = _smaller(this, gated, asked)
        if epochs == 0:
            return

        from tokenprune_ext.train import CrossEntropy

        this.train(smaller, CrossEntropy(label_smoothing), data, later, file.with_suffix(""), settings | asked)


def _check(model: nn.Module, asked: Mapping[str, Any]) -> int:
    """What can be refused before gates are trained: which channels go depends on them, and how many does not.

    Returns:
        The multiple that kept widths are of, in place of a device's name.
    """
    from copy import deepcopy

    from tokenprune_ext import vtp

    ranking = vtp.ranking_of(vtp.add_gates(deepcopy(model)), asked["align"])
    if asked["rate"] is not None:
        ranking.at_rate(asked["rate"])
    elif not 0 < asked["by_latency"] <= 1:
        raise ValueError(f"--by-latency must be in (0, 1], got {asked['by_latency']}")
    return ranking.align


def _smaller(this: Session, gated: nn.Module, asked: Mapping[str, Any]) -> tuple[nn.Module, Path]:
    """The smaller model and its file, which a command that goes on finds there."""
    from tokenprune_ext import checkpoint, vtp

    file = this.given["output"] / f"{_name(asked)}.safetensors"

    def remove() -> None:
        if not this.group.leads or file.exists():
            return
        if asked["rate"] is not None:
            checkpoint.save(vtp.prune(gated, asked["rate"], asked["align"]), file)
            return
        found = _as_fast(gated, asked, this.group.device)
        checkpoint.save(found.model, file)
        click.echo(f"latency of dense: {found.measured:.3f} measured, {found.estimated:.3f} estimated from widths")

    with values.usage_error(ValueError):
        this.group.together(remove)
        smaller = this.group.together(lambda: checkpoint.load(file, device=this.group.device))
    before, after = _size(vtp.remove_gates(gated)), _size(smaller)
    this.say(f"wrote {file}: {before[0]} -> {after[0]} M parameters, {before[1]} -> {after[1]} GMACs")
    return smaller, file


def _name(asked: Mapping[str, Any]) -> str:
    """Of what was removed, for files."""
    by_rate = f"rate-{asked['rate']}"
    by_latency = f"latency-{asked['by_latency']}-batch-{asked['latency_batch_size']}"
    name = by_latency if asked["rate"] is None else by_rate
    return name if asked["align"] == 1 else f"{name}-align-{asked['align']}"


def _as_fast(gated: Any, asked: Mapping[str, Any], device: torch.device) -> AsFast:
    import torch

    from tokenprune_ext import vtp
    from tokenprune_ext.latency import keep_freed_memory

    keep_freed_memory(device)
    batch, size = asked["latency_batch_size"], gated.patch_embed.img_size
    images = torch.randn(batch, gated.patch_embed.proj.in_channels, *size, device=device)
    return vtp.prune_to_latency(gated, asked["by_latency"], images, align=asked["align"])


def _size(model: nn.Module) -> tuple[str, str]:
    """Millions of parameters and billions of multiply-accumulates."""
    from tokenprune_ext.prune import describe

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters / 1e6:.2f}", f"{describe(model).model_macs / 1e9:.2f}"
