"""`tokenprune train`. A method that trains is one more subcommand: its own options, and `run` with its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext.cli_training import run, training_options

if TYPE_CHECKING:
    from torch import nn

    from tokenprune_ext.train import Objective


@click.group()
def train() -> None:
    """Train: on one process, or with torchrun --nproc-per-node K -m tokenprune_ext train ... on K.

    A run that was interrupted goes on where it was when the same command is given again.
    """


@train.command()
@training_options
@click.option("--label-smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.0)
@click.option(
    "--distill",
    type=click.FloatRange(0),
    default=0.0,
    help="Weight of the KL divergence from the model at the start.",
)
def finetune(label_smoothing: float, distill: float, **given: Any) -> None:
    """Fine-tune a model on labelled images."""

    def build(model: nn.Module) -> Objective:
        from copy import deepcopy

        from tokenprune_ext.train import CrossEntropy

        return CrossEntropy(label_smoothing, deepcopy(model) if distill else None, distill)

    run("finetune", build, {"label_smoothing": label_smoothing, "distill": distill}, given)
