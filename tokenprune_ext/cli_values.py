"""What the commands share: values of more than one word, options of every command, errors as messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
_OUTSIDE_BRACKETS = r"(?![^(\[]*[)\]])"


class ScheduleFile(click.ParamType[Path]):
    """A schedule file, or the name of a preset."""

    name = "schedule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from tokenprune_ext import presets

        if str(value) in presets.available() and not Path(value).exists():
            return presets.FOLDER / f"{value}.json"
        if not Path(value).is_file():
            self.fail(f"no file and no preset {str(value)!r}; presets: {', '.join(presets.available())}", param, ctx)
        return Path(value)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers; with `low` and `high`, each in (low, high]."""

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        self.low, self.high = low, high
        self.name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no comma-separated list of numbers", param, ctx)
        for number in numbers:
            if (self.low is not None and not number > self.low) or (self.high is not None and not number <= self.high):
                self.fail(f"{number:g} is not in ({self.low:g}, {self.high:g}]", param, ctx)
        return numbers


class Counts(click.ParamType[tuple[int, ...]]):
    """Comma-separated whole numbers from 1 on, each once."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
            self.fail(f"{value!r}: expected whole numbers from 1 on, like 1,2,4", param, ctx)
        return tuple(int(part) for part in value.split(","))


class Keep(click.ParamType[Any]):
    """Keep ratios (numbers with a point) or counts of patch tokens (whole numbers), one or one per layer."""

    name = "keep"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | list[int | float]:
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(part) if "." in part else int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}: expected ratios like 0.7 or counts like 120, separated by commas", param, ctx)
        return numbers[0] if len(numbers) == 1 and isinstance(numbers[0], float) else numbers


class Layers(click.ParamType[list[int]]):
    """Comma-separated 0-based block indices."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", value):
            self.fail(f"{value!r}: expected 0-based block indices like 3,6,9", param, ctx)
        return [int(part) for part in value.split(",")]


class Device(click.ParamType[Any]):
    """cpu, cuda or cuda:N that is really there."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        import torch

        found = torch.cuda.device_count()
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(value))
        if match is None:
            self.fail(f"{value!r}: expected cpu, cuda or cuda:N", param, ctx)
        if str(value) != "cpu" and int(match[1] or 0) >= found:
            self.fail(f"{value!r}: torch {torch.__version__} sees {found} CUDA devices", param, ctx)
        return torch.device(str(value))


device_option = click.option("--device", type=Device(), help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.")
labels_option = click.option("--labels", type=FILE, help="Names of the classes in the model's order, one per line.")
unlabelled_option = click.option("--unlabelled", is_flag=True, help="Ignore labels; compare with the dense model only.")


def parse_methods(text: str) -> dict[str, Any]:
    """`Method` instances by their own text, from `name[:option=value...][,...]`.

    Raises:
        click.UsageError: unknown method, unknown option or a value it does not take.
    """
    return {part: parse_method(part) for part in (p.strip() for p in re.split("," + _OUTSIDE_BRACKETS, text)) if part}


def parse_method(text: str) -> Any:
    """One `Method` from `name[:option=value...]`; values are Python literals or plain words."""
    from tokenprune_ext import methods

    name, *settings = re.split(":" + _OUTSIDE_BRACKETS, text)
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise click.UsageError(f"method {text!r}: expected name:option=value, got {setting!r}")
        options[key] = literal(value)
    with usage_error(TypeError, ValueError):
        return methods.create(name, **options)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--img-size", type=click.IntRange(1), help="Side of the input in pixels.")(command)
    return click.option("--model", "model_name", required=True, help="Any timm model name.")(command)


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(
        command,
        click.option("--weights", type=FILE, help="Local weights: .safetensors, .pth, .pt or .bin."),
        click.option("--pretrained", is_flag=True, help="Take the weights from the hub."),
    )


def preprocess_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How images become inputs: keywords of `data.preprocessing`."""
    return with_options(
        command,
        click.option("--mean", type=Numbers(), help="Normalisation, one or three numbers.  [default: the model's]"),
        click.option("--std", type=Numbers(), help="Normalisation, one or three numbers.  [default: the model's]"),
        click.option(
            "--interpolation",
            type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos"]),
            help="[default: the model's]",
        ),
        click.option(
            "--crop-pct",
            type=click.FloatRange(0, 1, min_open=True),
            help="Centre crop over resized side.  [default: the model's]",
        ),
    )


def pruning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where and how much is pruned: keywords of `prune.apply`."""
    return with_options(
        command,
        click.option("--layers", type=Layers(), help="0-based blocks that prune, like 3,6,9.  [default: the method's]"),
        click.option("--keep", type=Keep(), help="Ratio or count kept, one or one per layer: 0.7 or 150,110,80."),
        click.option(
            "--macs",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of the blocks' MACs to keep, scoring charged.",
        ),
    )


def with_options(command: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options, which stand in this order before those it has."""
    for option in reversed(options):
        command = option(command)
    return command


def parse_pruning(method: str | None, schedule: Path | None, how: Mapping[str, Any]) -> Any:
    """What `--method` or `--schedule` names, for `prune.apply` with the pruning options; None for the dense model."""
    if method is not None and schedule is not None:
        raise click.UsageError("give --method or --schedule, not both")
    if method is None and any(value is not None for value in how.values()):
        raise click.UsageError("--layers, --keep and --macs need --method")
    if method is not None:
        return parse_method(method)
    return None if schedule is None else load_schedule(schedule)


def load_schedules(paths: tuple[Path, ...]) -> dict[str, Any]:
    """Schedules by the names of their files."""
    found = {path.stem: load_schedule(path) for path in paths}
    if len(found) < len(paths):
        raise click.UsageError("two --schedule files have the same name, which is their label: rename one")
    return found


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_schedule(path: Path) -> Any:
    from tokenprune_ext.schedule import Schedule

    with usage_error(ValueError):
        return Schedule.load(path)


@contextmanager
def usage_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Report errors of these kinds as wrong usage (exit code 2), without a traceback."""
    try:
        yield
    except kinds as error:
        raise click.UsageError(f"{prefix}{error}") from error


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that have an explanation into messages: exit code 2 for wrong input, 1 for a failed run."""
    import torch

    from tokenprune_ext.compare import CompareError
    from tokenprune_ext.data import DataError
    from tokenprune_ext.evaluate import EvaluationError
    from tokenprune_ext.loading import ModelError

    try:
        with usage_error(CompareError, DataError, ModelError):
            yield
    except EvaluationError as error:
        raise click.ClickException(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException("out of memory on the device: use a smaller --batch-size") from error


def console() -> Any:
    """A console that does not squeeze tables when the output goes to a file."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
