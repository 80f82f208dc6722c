"""`tokenprune eval`."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_images import Inputs, check_weights, input_options, load_inputs, run_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokenprune_ext.compare import Macs
    from tokenprune_ext.evaluate import Accuracy
    from tokenprune_ext.report.table import Column
    from tokenprune_ext.sharded import Evaluation

_NAMED = 10  # images that could not be read; the JSON file has all


@dataclass(frozen=True)
class _Row:
    """What was found of one model; as `compare.Row`, with the throughput of the evaluation itself."""

    name: str
    method: str | None
    schedule: dict[str, Any] | None
    macs: Macs
    accuracy: Accuracy
    images_per_s: float


@click.command("eval")
@input_options
@click.option("--method", help="name[:option=value...]; without it and --schedule the dense model alone.")
@values.pruning_options
@click.option("--schedule", type=values.ScheduleFile(), help="Schedule file or preset instead of --method.")
@run_options
@click.option(
    "--on-corrupt",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    help="What an image that cannot be read does: end the evaluation, or be named, counted and left out.",
)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    method: str | None,
    schedule: Path | None,
    layers: Any,
    keep: Any,
    macs: float | None,
    batch_size: int,
    workers: int,
    device: Any,
    dtype: str,
    threads: int | None,
    on_corrupt: str,
    output: Path | None,
    **inputs: Any,
) -> None:
    """Accuracy of a model, dense and pruned, on many images.

    On K processes: torchrun --nproc-per-node K -m tokenprune_ext eval ... gives the same figures.
    """
    with values.explained():
        import torch
        from rich.progress import Progress

        from tokenprune_ext.distributed import ProcessError, processes
        from tokenprune_ext.sharded import evaluate_sharded, own_images

        if threads is not None:
            torch.set_num_threads(threads)
        how = {"layers": layers, "keep": keep, "macs": macs}
        with ExitStack() as stack:
            with values.usage_error(ValueError):
                group = stack.enter_context(processes(device or values.default_device()))
            if not group.leads:
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)

            def prepare() -> tuple[Inputs, dict[str, nn.Module]]:
                check_weights(inputs["weights"], inputs["pretrained"])
                if output is not None and not output.parent.is_dir():
                    raise click.UsageError(f"cannot write {output}: no such folder")
                pruning = values.parse_pruning(method, schedule, how)
                loaded = load_inputs(**inputs)
                loaded.model.to(group.device, getattr(torch, dtype))
                return loaded, _models(loaded.model, pruning, schedule.name if schedule else method, how)

            try:
                loaded, models = group.together(prepare)
            except ProcessError as error:
                raise click.ClickException(str(error)) from error
            start = time.perf_counter()
            with Progress(console=values.console(), transient=True, disable=not group.leads) as progress:
                share = progress.add_task("images", total=own_images(len(loaded.images), batch_size, group))
                found = evaluate_sharded(
                    models,
                    loaded.images,
                    loaded.transform,
                    group,
                    batch_size=batch_size,
                    workers=workers,
                    dtype=getattr(torch, dtype),
                    skip_corrupt=on_corrupt == "skip",
                    on_batch=lambda done: progress.advance(share, done),
                )
            if group.leads:
                seconds = time.perf_counter() - start
                settings = {"dtype": dtype, "batch_size": batch_size, "processes": group.count}
                settings |= {"on_corrupt": on_corrupt, "preprocessing": loaded.config}
                with values.usage_error(OSError, prefix="cannot write the figures: "):
                    _report(ctx.obj, output, loaded, models, found, settings, group.device, seconds)


def _models(model: nn.Module, pruning: Any, label: str | None, how: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The dense model and, by what was asked for, its pruned copy."""
    from tokenprune_ext.compare import DENSE, share
    from tokenprune_ext.patch import inspect_host
    from tokenprune_ext.prune import apply

    models = {DENSE: model}
    with values.usage_error(TypeError, ValueError):
        inspect_host(model)
        if pruning is not None:
            name = " ".join([str(label), *(f"{key}={value}" for key, value in how.items() if value is not None)])
            models.setdefault(name, apply(share(model), pruning, **how))
    return models


def _report(
    command: str,
    output: Path | None,
    inputs: Inputs,
    models: Mapping[str, nn.Module],
    found: Evaluation,
    settings: dict[str, Any],
    device: torch.device,
    seconds: float,
) -> None:
    """Print the table and what was skipped; write all of it."""
    from tokenprune_ext.compare import DENSE, macs_of
    from tokenprune_ext.environment import environment
    from tokenprune_ext.prune import describe, schedule_of
    from tokenprune_ext.report.table import print_table

    rows = [
        _Row(
            name=name,
            method=None if name == DENSE else schedule_of(model).method,
            schedule=None if name == DENSE else asdict(schedule_of(model)),
            macs=macs_of(model),
            accuracy=found.accuracy[name],
            images_per_s=found.images_per_s[name],
        )
        for name, model in models.items()
    ]
    architecture, where = describe(inputs.model).model, environment(device)
    count = settings["processes"]
    title = (
        f"{architecture}, {rows[0].accuracy.images} images, {where['device']}, {settings['dtype']}, "
        f"batch {settings['batch_size']}, {count} process{'es' if count > 1 else ''}, {seconds:.1f} s"
    )
    print_table(values.console(), rows, title, _columns())
    files = {str(inputs.images.files[number]): error for number, error in found.corrupt.items()}
    if files:
        click.echo(f"skipped {len(files)} of {len(inputs.images)} images that cannot be read:", err=True)
        for error in list(files.values())[:_NAMED]:
            click.echo(f"  {error}", err=True)
        if len(files) > _NAMED:
            click.echo(f"  and {len(files) - _NAMED} more", err=True)
    if output is not None:
        figures = {
            "model": architecture,
            "command": command,
            "images": len(inputs.images),
            "corrupt": [{"file": file, "error": error} for file, error in files.items()],
            "rows": [asdict(row) for row in rows],
            "seconds": seconds,
            "settings": settings,
            "environment": where,
        }
        output.write_text(json.dumps(figures, indent=2, default=str) + "\n", "utf-8")
        click.echo(f"wrote {output}")


def _columns() -> list[Column]:
    """Those of the comparison, as far as they are evaluated, and two more."""
    from tokenprune_ext.report.table import COLUMNS, NOT_MEASURED, Column

    def top5(row: _Row) -> str:
        return NOT_MEASURED if row.accuracy.top5 is None else f"{100 * row.accuracy.top5:.2f}"

    shown = {column.heading: column for column in COLUMNS}
    return [
        *(shown[heading] for heading in ("variant", "with scoring, G", "top-1, %", "change, points")),
        Column("top-5, %", "share of images whose label is among the best five classes", top5),
        *(shown[heading] for heading in ("agreement, %", "KL")),
        Column("images/s", "of the forward alone", lambda row: f"{row.images_per_s:.1f}"),
    ]
