"""`tokenprune compare` and `tokenprune demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_values import FILE, FOLDER

METHODS = "auto,tome,zero_tprune,evit,pomt,topk,random"  # what is compared unless one says otherwise


@click.command()
@values.model_options
@click.option("--weights", type=FILE, help="Local weights: .safetensors, .pth, .pt or .bin.")
@click.option("--pretrained", is_flag=True, help="Take the weights from the hub.")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Folder of class folders, folder of images, or TSV of file and class index.",
)
@click.option("--labels", type=FILE, help="Names of the classes in the model's order, one per line.")
@click.option("--unlabelled", is_flag=True, help="Ignore labels; compare with the dense model only.")
@click.option("--methods", default=METHODS, help="name[:option=value...], separated by commas.")
@click.option(
    "--budgets",
    type=values.Numbers(0, 1),
    default="0.8,0.64,0.54",
    help="Shares of the blocks' MACs to keep, scoring charged.",
)
@click.option(
    "--schedule",
    "schedules",
    type=values.ScheduleFile(),
    multiple=True,
    help="Schedule file as a further row; repeatable.",
)
@values.preprocess_options
@click.option("--batch-size", type=click.IntRange(1), default=32)
@click.option("--limit", type=click.IntRange(1), help="At most so many images, balanced over the classes.")
@click.option(
    "--workers", type=click.IntRange(0), default=min(4, os.cpu_count() or 1), help="Processes that read images."
)
@click.option("--device", type=values.Device(), help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Weights and inputs are cast to it.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.")
@click.option("--latency/--no-latency", default=True, help="Measure latency.")
@click.option("--latency-budget", type=click.FloatRange(0), default=60.0, help="Seconds for the latency rounds.")
@click.option("--seed", type=int, default=0, help="Of the choice of images.")
@click.option(
    "--output", type=FOLDER, default=Path("tokenprune-report"), help="Folder for report.json and report.html."
)
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    model_name: str,
    img_size: int | None,
    weights: Path | None,
    pretrained: bool,
    data: Path,
    labels: Path | None,
    unlabelled: bool,
    methods: str,
    budgets: tuple[float, ...],
    schedules: tuple[Path, ...],
    batch_size: int,
    limit: int | None,
    workers: int,
    device: Any,
    dtype: str,
    threads: int | None,
    latency: bool,
    latency_budget: float,
    seed: int,
    output: Path,
    **preprocess: Any,
) -> None:
    """Compare a model with itself pruned: MACs, accuracy, latency and memory, as a table and a report.

    Dense is the unpatched model with its own fused attention, in the same run.
    """
    if (weights is None) == (not pretrained):
        raise click.UsageError(
            "give either --weights FILE or --pretrained: a comparison of random weights would say nothing"
        )
    with values.explained():
        import torch

        from tokenprune_ext.data import load_images, preprocessing, read_class_names
        from tokenprune_ext.loading import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        chosen = values.parse_methods(methods)
        model = load_model(model_name, weights=weights, pretrained=pretrained, img_size=img_size)
        names = None if labels is None else read_class_names(labels)
        images = load_images(data, _num_classes(model), class_names=names, unlabelled=unlabelled).choose(limit, seed)
        config, transform = preprocessing(model, img_size=img_size, **preprocess)
        _compare(
            ctx.obj,
            output,
            model,
            images,
            transform,
            data_config=config,
            methods=chosen,
            budgets=budgets,
            schedules=values.load_schedules(schedules),
            batch_size=batch_size,
            workers=workers,
            device=device,
            dtype=getattr(torch, dtype),
            latency_budget_s=latency_budget if latency else None,
            class_names=images.class_names,
        )


@click.command()
@click.option("--output", type=FOLDER, default=Path("tokenprune-demo"), help="Folder for report.json and report.html.")
@click.option("--images", "count", type=click.IntRange(1), default=500, help="Number of generated images.")
@click.option("--latency-budget", type=click.FloatRange(0), default=20.0, help="Seconds for the latency rounds.")
@click.pass_context
def demo(ctx: click.Context, /, output: Path, count: int, latency_budget: float) -> None:
    """Compare on the small model and the generated images that come with the package."""
    with values.explained():
        from tokenprune_ext import demo as embedded
        from tokenprune_ext.data import preprocessing

        model = embedded.load_model()
        config, transform = preprocessing(model)
        _compare(
            ctx.obj,
            output,
            model,
            embedded.DemoImages(count, seed=1),
            transform,
            data_config=config,
            methods=values.parse_methods(METHODS),
            batch_size=min(count, 32),
            latency_budget_s=latency_budget,
            class_names=embedded.CLASSES,
        )


def _compare(command: str, output: Path, *args: Any, device: Any = None, **options: Any) -> None:
    """Run the comparison with progress bars, print its table, write its report."""
    from rich.progress import Progress

    from tokenprune_ext.compare import compare as run
    from tokenprune_ext.report import write_report
    from tokenprune_ext.report.table import print_table

    with values.usage_error(OSError, prefix="cannot write the report: "):
        output.mkdir(parents=True, exist_ok=True)  # before minutes of work
    console = values.console()
    with Progress(console=console, transient=True) as progress:
        comparison = run(*args, device=device or values.default_device(), progress=progress, **options)
    env, settings = comparison.environment, comparison.settings
    title = (
        f"{comparison.model}, {settings['images']} images, {env['device']}, {settings['dtype'].split()[0]}, "
        f"batch {settings['batch_size']}"
    )
    print_table(console, comparison.rows, title)
    for note in comparison.notes:
        click.echo(f"note: {note}", err=True)
    with values.usage_error(OSError, prefix="cannot write the report: "):
        for path in write_report(comparison, output, command):
            click.echo(f"wrote {path}")


def _num_classes(model: Any) -> int:
    classes = getattr(model, "num_classes", 0)
    if not classes:
        raise click.UsageError("the model has no classifier: its output is no class scores to compare")
    return int(classes)
