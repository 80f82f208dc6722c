"""What the subcommands of `tokenprune train` share: options, the model and the images, and the run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_values as values

if TYPE_CHECKING:
    from torch import nn

    from tokenprune_ext.distributed import Processes
    from tokenprune_ext.train import Objective, Options, Trained, TrainingData

IMAGES = click.Path(exists=True, path_type=Path)
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct")
_AUGMENTATION = ("crop_scale", "hflip", "color_jitter", "auto_augment", "erase")
_POSITIVE, _COUNT = click.FloatRange(0, min_open=True), click.IntRange(1)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Keywords of `run`, beside those of the method, which come first in the help."""
    return values.with_options(
        _input_options(_augmentation_options(_optimisation_options(command))),
        click.option(
            "--output", type=values.FOLDER, required=True, help="Folder of the run; the same command goes on."
        ),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read images, each."),
        values.device_option,
        values.threads_option,
        click.option("--log-every", type=_COUNT, default=10, help="Steps of a row of metrics.csv."),
        click.option("--save-every", type=_COUNT, help="Steps between checkpoints.  [default: an epoch]"),
        click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files too."),
    )


def _input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return values.with_options(
        values.preprocess_options(command),
        click.option("--demo", is_flag=True, help="The small model and the generated images of the package."),
        click.option("--images", type=_COUNT, default=4000, help="Generated images, with --demo."),
        click.option("--held-out-images", type=_COUNT, default=1000, help="Generated images to validate on."),
        click.option("--model", "model_name", help="Any timm model name."),
        click.option("--img-size", type=_COUNT, help="Side of the input in pixels."),
        values.weights_options,
        click.option("--scratch", is_flag=True, help="Start from random weights."),
        click.option("--data", type=IMAGES, help="Folder of class folders, or TSV of file and class index."),
        click.option("--held-out", type=IMAGES, help="Images to validate on after every epoch, as --data."),
        values.labels_option,
        click.option("--limit", type=_COUNT, help="At most so many images, balanced over the classes."),
    )


def _augmentation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    share, area, strength = click.FloatRange(0, 1), click.FloatRange(0, 1, min_open=True), click.FloatRange(0)
    return values.with_options(
        command,
        click.option("--crop-scale", type=area, help="Least area of a crop; 1: no crops.  [default: 0.08; --demo: 1]"),
        click.option("--hflip", type=share, default=0.5, help="Probability of mirroring."),
        click.option("--color-jitter", type=strength, help="Strength.  [default: 0.4; --demo: 0]"),
        click.option("--auto-augment", help="timm's policy, like rand-m9-mstd0.5-inc1."),
        click.option("--erase", type=share, default=0.0, help="Probability of erasing a rectangle."),
        click.option("--mixup", type=strength, default=0.0, help="Strength."),
        click.option("--cutmix", type=strength, default=0.0, help="Strength."),
    )


def _optimisation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return values.with_options(
        command,
        click.option("--epochs", type=_COUNT, default=10),
        click.option("--batch-size", type=_COUNT, default=64, help="Images of a step, over all processes."),
        click.option("--accumulate", type=_COUNT, default=1, help="Parts in which a process computes a step."),
        click.option("--opt", default="adamw", help="timm's name of the optimiser."),
        click.option("--lr", type=_POSITIVE, default=1e-4, help="Learning rate."),
        click.option("--weight-decay", type=click.FloatRange(0), default=0.05),
        click.option("--sched", default="cosine", help="timm's name of the schedule: cosine, poly, step or tanh."),
        click.option("--min-lr", type=click.FloatRange(0), default=0.0, help="Where the schedule ends."),
        click.option("--warmup-epochs", type=click.FloatRange(0), default=0.0),
        click.option("--warmup-lr", type=click.FloatRange(0), default=0.0, help="Where warming up starts."),
        click.option("--clip-grad", type=_POSITIVE, default=1.0, help="Largest norm of the gradients."),
        click.option("--amp", type=click.Choice(["none", "bfloat16", "float16"]), default="none", help="Autocast."),
        click.option("--seed", type=click.IntRange(0), default=0),
    )


@dataclass
class Session:
    """A command that trains, on one of its processes."""

    group: Processes
    given: Mapping[str, Any]

    def start(self, build: Callable[[nn.Module], Objective]) -> tuple[nn.Module, Objective, TrainingData, Options]:
        """The dense model on its device, the objective that `build` makes from it, the images, and how to train.

        `build` raises ValueError or TypeError for values that do not fit the model.
        """
        from tokenprune_ext.train import Options

        def prepare() -> tuple[nn.Module, Objective, TrainingData, Options]:
            with values.usage_error(TypeError, ValueError):
                options = Options(**{name: self.given[name] for name in Options.__dataclass_fields__})
                model = _model(self.given).to(self.group.device)
                return model, build(model), _data(model, self.given), options

        return self.group.together(prepare)

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        data: TrainingData,
        options: Options,
        output: Path,
        settings: Mapping[str, Any],
    ) -> Trained:
        """Train and say where the result is; `settings` are the method's plain values, with its name."""
        from tokenprune_ext.train import train

        console, tensorboard = values.console(), self.given["tensorboard"]
        named = _settings(settings, self.given)
        found = train(
            model,
            objective,
            data,
            options,
            output,
            processes=self.group,
            settings=named,
            tensorboard=tensorboard,
            console=console,
        )
        accuracy = "" if found.top1 is None else f", top-1 {found.top1:.2%}"
        self.say(f"wrote {output / 'model.safetensors'} after {found.steps} steps{accuracy}")
        return found

    def say(self, text: str) -> None:
        """Print it once."""
        if self.group.leads:
            click.echo(text)


@contextmanager
def session(given: Mapping[str, Any]) -> Iterator[Session]:
    """The processes of a command with these values of `training_options`, and its errors in one line."""
    with values.explained():
        import torch

        from tokenprune_ext.distributed import ProcessError, processes
        from tokenprune_ext.train import Diverged, RunError

        if given["threads"] is not None:
            torch.set_num_threads(given["threads"])
        with ExitStack() as stack:
            with values.usage_error(ValueError):
                group = stack.enter_context(processes(given["device"] or values.default_device()))
            if not group.leads:
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            try:
                yield Session(group, given)
            except RunError as error:
                raise click.UsageError(str(error)) from error
            except (ProcessError, Diverged) as error:
                if not group.leads:  # all of them know, one says it
                    raise SystemExit(1) from None
                raise click.ClickException(str(error)) from error


def run(
    method: str, build: Callable[[nn.Module], Objective], settings: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """A command that trains once, with the objective that `build` makes from the dense model on its device.

    Args:
        method: its name; with `settings`, the method's plain values, part of what a resumed run must share.
        build: see `Session.start`.
        given: values of `training_options`.
    """
    with session(given) as this:
        this.train(*this.start(build), given["output"], {"method": method, **settings})


def _settings(method: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values the weights depend on, beside those that the loop knows of itself."""
    names = ("demo", "model_name", "img_size", "limit", *_PREPROCESSING, *_AUGMENTATION)
    named = {**method, **{name: given[name] for name in names}}
    paths = {name: given[name] and os.path.abspath(given[name]) for name in ("data", "held_out", "labels")}
    return named | paths


def _model(given: Mapping[str, Any]) -> nn.Module:
    """The dense model to start from, float32, in eval mode."""
    import torch

    from tokenprune_ext import demo
    from tokenprune_ext.demo.model import create_model, initialise
    from tokenprune_ext.loading import load_model

    named, weights = given["model_name"], given["weights"]
    if given["demo"] == (named is not None):
        raise click.UsageError("give either --demo or --model NAME")
    chosen = [name for name in ("weights", "pretrained", "scratch") if given[name]]
    if len(chosen) > 1 or (named is not None and not chosen):
        raise click.UsageError("give one of --weights FILE, --pretrained and --scratch")
    torch.manual_seed(given["seed"])
    if named is not None:
        if given["data"] is None:
            raise click.UsageError("Missing option '--data'.")
        return load_model(named, weights=weights, pretrained=given["pretrained"], img_size=given["img_size"])
    for name in ("data", "held_out", "labels", "limit", "img_size", "pretrained"):
        if given[name]:
            raise click.UsageError(f"--demo has a model and images of its own: no --{name.replace('_', '-')}")
    if weights is not None:
        return load_model("vit_demo", weights=weights)
    if not given["scratch"]:
        return demo.load_model()
    fresh = create_model()
    initialise(fresh, torch.Generator().manual_seed(given["seed"]))
    return fresh.eval()


def _data(model: Any, given: Mapping[str, Any]) -> TrainingData:
    """The images and their preprocessing."""
    from timm.data.transforms_factory import create_transform

    from tokenprune_ext.data import ImageSource, load_images, preprocessing, read_class_names
    from tokenprune_ext.demo import DemoImages
    from tokenprune_ext.train import TrainingData

    config, plain = preprocessing(model, **{name: given[name] for name in ("img_size", *_PREPROCESSING)})
    # The objects of generated images are small, and some classes differ in little else than a few patches.
    defaults = {"crop_scale": 1.0, "color_jitter": 0.0} if given["demo"] else {"crop_scale": 0.08, "color_jitter": 0.4}
    crop, jitter = (value if given[name] is None else given[name] for name, value in defaults.items())
    with values.usage_error(AssertionError, KeyError, prefix=f"auto-augment {given['auto_augment']!r}: "):
        augmented = create_transform(
            config["input_size"],
            is_training=True,
            scale=(crop, 1.0),
            ratio=(1.0, 1.0) if crop == 1 else (3 / 4, 4 / 3),
            hflip=given["hflip"],
            color_jitter=jitter,
            auto_augment=given["auto_augment"],
            re_prob=given["erase"],
            **{name: config[name] for name in ("interpolation", "mean", "std")},
        )
    images: ImageSource
    held_out: ImageSource | None
    classes = int(getattr(model, "num_classes", 0) or 0)
    if given["demo"]:
        images, held_out = DemoImages(given["images"], split="train"), DemoImages(given["held_out_images"], split="val")
    else:
        if not classes:
            raise click.UsageError("the model has no classifier to train")
        labels = None if given["labels"] is None else read_class_names(given["labels"])
        images = load_images(given["data"], classes, class_names=labels).choose(given["limit"], given["seed"])
        found = given["held_out"]
        held_out = None if found is None else load_images(found, classes, class_names=labels)
    return TrainingData(images, augmented, classes, None if held_out is None else (held_out, plain))
