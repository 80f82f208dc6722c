"""`tokenprune train`. A method that trains is one more subcommand: its own options, and `run` with its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_train_vtp
from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_training import run, training_options

if TYPE_CHECKING:
    from torch import nn

    from tokenprune_ext.train import Objective

_WEIGHT, _SMOOTHING = click.FloatRange(0), click.FloatRange(0, 1, max_open=True)


@click.group()
def train() -> None:
    """Train: on one process, or with torchrun --nproc-per-node K -m tokenprune_ext train ... on K.

    A run that was interrupted goes on where it was when the same command is given again.
    """


@train.command()
@click.option("--label-smoothing", type=_SMOOTHING, default=0.0)
@click.option("--distill", type=_WEIGHT, default=0.0, help="Weight of the KL divergence from the model at the start.")
@training_options
def finetune(label_smoothing: float, distill: float, **given: Any) -> None:
    """Fine-tune a model on labelled images."""

    def build(model: nn.Module) -> Objective:
        from copy import deepcopy

        from tokenprune_ext.train import CrossEntropy

        return CrossEntropy(label_smoothing, deepcopy(model) if distill else None, distill)

    run("finetune", build, {"label_smoothing": label_smoothing, "distill": distill}, given)


@train.command()
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), default=0.7, help="Keep ratio of each stage.")
@click.option(
    "--before", type=values.Layers(), help="Blocks behind the predictors, from 0.  [default: three, evenly spread]"
)
@click.option("--backbone-lr-scale", type=_WEIGHT, default=0.01, help="Learning rate of the model over --lr.")
@click.option("--label-smoothing", type=_SMOOTHING, default=0.0)
@click.option("--ratio-weight", type=_WEIGHT, default=2.0, help="Of the kept shares' distance from the keep ratios.")
@click.option("--tokens-weight", type=_WEIGHT, default=0.5, help="Of the kept tokens' distance from the teacher's.")
@click.option("--kl-weight", type=_WEIGHT, default=0.5, help="Of the KL divergence from the teacher.")
@training_options
def dynamicvit(before: list[int] | None, **given: Any) -> None:
    """DynamicViT: predictors that learn which tokens to keep. The teacher is the model at the start.

    --lr is that of the predictors. What is written, and measured after every epoch, is the pruned model.
    """
    names = ("keep", "backbone_lr_scale", "label_smoothing", "ratio_weight", "tokens_weight", "kl_weight")
    settings = {name: given.pop(name) for name in names}

    def build(model: nn.Module) -> Objective:
        from copy import deepcopy

        from tokenprune_ext.dynamicvit import add_predictors
        from tokenprune_ext.dynamicvit.objective import DynamicViTObjective
        from tokenprune_ext.dynamicvit.predictors import PREDICTORS

        objective = DynamicViTObjective(deepcopy(model), **settings)
        if not hasattr(model, PREDICTORS):
            add_predictors(model, before)
        return objective

    run("dynamicvit", build, {**settings, "before": before}, given)


train.add_command(cli_train_vtp.vtp)
