"""What the commands that run a model over images share: their options, the model and the images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values


@dataclass(frozen=True)
class Inputs:
    """A trained model and what it is run on."""

    model: Any
    images: Any
    config: dict[str, Any]  # of the preprocessing
    transform: Callable[[Any], Any]


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Keywords of `load_inputs`."""
    command = values.with_options(
        values.preprocess_options(command),
        values.weights_options,
        click.option(
            "--data",
            required=True,
            type=click.Path(exists=True, path_type=Path),
            help="Folder of class folders, folder of images, or TSV of file and class index.",
        ),
        values.labels_option,
        values.unlabelled_option,
        click.option("--limit", type=click.IntRange(1), help="At most so many images, balanced over the classes."),
        click.option("--seed", type=int, default=0, help="Of the choice of images."),
    )
    return values.model_options(command)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is run."""
    return values.with_options(
        command,
        click.option("--batch-size", type=click.IntRange(1), default=32),
        click.option(
            "--workers",
            type=click.IntRange(0),
            default=min(4, os.cpu_count() or 1),
            help="Processes that read images.",
        ),
        values.device_option,
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            help="Weights and inputs are cast to it.",
        ),
        values.threads_option,
    )


def check_weights(weights: Path | None, pretrained: bool) -> None:
    if (weights is None) == (not pretrained):
        raise click.UsageError(
            "give either --weights FILE or --pretrained: a comparison of random weights would say nothing"
        )


def load_inputs(
    *,
    model_name: str,
    img_size: int | None,
    weights: Path | None,
    pretrained: bool,
    data: Path,
    labels: Path | None,
    unlabelled: bool,
    limit: int | None,
    seed: int,
    **preprocess: Any,
) -> Inputs:
    """The dense model and the images, from `input_options`."""
    from tokenprune_ext.data import load_images, preprocessing, read_class_names
    from tokenprune_ext.loading import load_model

    model: Any = load_model(model_name, weights=weights, pretrained=pretrained, img_size=img_size)
    classes = int(getattr(model, "num_classes", 0) or 0)
    if not classes:
        raise click.UsageError("the model has no classifier: its output is no class scores to compare")
    names = None if labels is None else read_class_names(labels)
    images = load_images(data, classes, class_names=names, unlabelled=unlabelled).choose(limit, seed)
    return Inputs(model, images, *preprocessing(model, img_size=img_size, **preprocess))
