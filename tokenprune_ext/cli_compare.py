"""`tokenprune compare` and `tokenprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_images import check_weights, input_options, load_inputs, run_options
from tokenprune_ext.cli_values import FOLDER

METHODS = "auto,tome,zero_tprune,evit,pomt,topk,random"  # what is compared unless one says otherwise


@click.command()
@input_options
@click.option("--methods", default=METHODS, help="name[:option=value...], separated by commas.")
@click.option(
    "--budgets",
    type=values.Numbers(0, 1),
    default="0.8,0.64,0.54",
    help="Shares of the blocks' MACs to keep, scoring charged.",
)
@click.option(
    "--schedule", "schedules", type=values.ScheduleFile(), multiple=True, help="Schedule file or preset, a further row."
)
@run_options
@click.option("--latency/--no-latency", default=True, help="Measure latency.")
@click.option("--latency-budget", type=click.FloatRange(0), default=60.0, help="Seconds for the latency rounds.")
@click.option(
    "--output", type=FOLDER, default=Path("tokenprune-report"), help="Folder for report.json and report.html."
)
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    methods: str,
    budgets: tuple[float, ...],
    schedules: tuple[Path, ...],
    batch_size: int,
    workers: int,
    device: Any,
    dtype: str,
    threads: int | None,
    latency: bool,
    latency_budget: float,
    output: Path,
    **inputs: Any,
) -> None:
    """Compare a model with itself pruned: MACs, accuracy, latency and memory, as a table and a report.

    Dense is the unpatched model with its own fused attention, in the same run. Latency on a CPU is measured with freed
    memory kept by the process; MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 does that for a program of yours.
    """
    check_weights(inputs["weights"], inputs["pretrained"])
    with values.explained():
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        chosen = values.parse_methods(methods)
        loaded = load_inputs(**inputs)
        _compare(
            ctx.obj,
            output,
            loaded.model,
            loaded.images,
            loaded.transform,
            data_config=loaded.config,
            methods=chosen,
            budgets=budgets,
            schedules=values.load_schedules(schedules),
            batch_size=batch_size,
            workers=workers,
            device=device,
            dtype=getattr(torch, dtype),
            latency_budget_s=latency_budget if latency else None,
            class_names=loaded.images.class_names,
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


def _compare(
    command: str, output: Path, *args: Any, device: Any = None, latency_budget_s: float | None, **options: Any
) -> None:
    """Run the comparison with progress bars, print its table, write its report."""
    from rich.progress import Progress

    from tokenprune_ext.compare import compare as run
    from tokenprune_ext.latency import keep_freed_memory
    from tokenprune_ext.report import write_report
    from tokenprune_ext.report.table import print_table

    with values.usage_error(OSError, prefix="cannot write the report: "):
        output.mkdir(parents=True, exist_ok=True)  # before minutes of work
    console = values.console()
    device = device or values.default_device()
    if latency_budget_s is not None:
        keep_freed_memory(device)
    with Progress(console=console, transient=True) as progress:
        comparison = run(*args, device=device, latency_budget_s=latency_budget_s, progress=progress, **options)
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
