"""`tokenprune search`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_images import check_weights, input_options, load_inputs, run_options
from tokenprune_ext.cli_values import FOLDER

if TYPE_CHECKING:
    from tokenprune_ext.search import SearchResult


class Budget(click.ParamType[float]):
    """A share of the dense model to stay within, 0.65, or a saving, -35%."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):
            return value
        saving = re.fullmatch(r"-(\d+(?:\.\d+)?)%", value)
        try:
            share = 1 - float(saving[1]) / 100 if saving else float(value)
        except ValueError:
            self.fail(f"{value!r}: expected a share like 0.65 or a saving like -35%", param, ctx)
        if not 0 < share <= 1:
            self.fail(f"{value!r} leaves {share:g} of the dense model: expected a share in (0, 1]", param, ctx)
        return round(share, 6)


@click.command()
@input_options
@click.option("--method", default="auto", help="name[:option=value...]")
@click.option("--layers", type=values.Layers(), help="Blocks that may prune.  [default: all but the last]")
@click.option("--tune", multiple=True, help="Option of the method to vary: name=value|value...; repeatable.")
@click.option("--budget-macs", type=Budget(), multiple=True, help="0.65 or -35% of the blocks' MACs; repeatable.")
@click.option(
    "--budget-latency", type=Budget(), multiple=True, help="0.7 or -30% of the dense model's latency, estimated."
)
@click.option("--latency-batch-size", type=click.IntRange(1), default=1, help="Batch whose latency counts.")
@click.option("--latency-seconds", type=click.FloatRange(0), default=30.0, help="For measuring whole models.")
@click.option("--trials", type=click.IntRange(1), default=200, help="Schedules to try at each budget.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Processes that try schedules side by side.")
@click.option(
    "--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.5, help="Share of the images kept for judging."
)
@run_options
@click.option("--output", type=FOLDER, default=Path("tokenprune-search"), help="Folder for trials and schedules.")
@click.pass_context
def search(
    ctx: click.Context,
    /,
    method: str,
    layers: list[int] | None,
    tune: tuple[str, ...],
    budget_macs: tuple[float, ...],
    budget_latency: tuple[float, ...],
    latency_batch_size: int,
    latency_seconds: float,
    trials: int,
    jobs: int,
    holdout: float,
    batch_size: int,
    workers: int,
    device: Any,
    dtype: str,
    threads: int | None,
    output: Path,
    **inputs: Any,
) -> None:
    """Search the keep counts of every block that stay closest to the dense model at a budget.

    Needs no labels. A part of the images is held out and judges what was found against uniform keep ratios. A search
    that was interrupted goes on where it was when the same command is given again.
    """
    check_weights(inputs["weights"], inputs["pretrained"])
    if bool(budget_macs) == bool(budget_latency):
        raise click.UsageError("give either --budget-macs or --budget-latency")
    with values.explained():
        import torch
        from rich.progress import Progress

        from tokenprune_ext.environment import device_name
        from tokenprune_ext.macs import MacsShare
        from tokenprune_ext.search import search as run
        from tokenprune_ext.search.images import split_images
        from tokenprune_ext.search.space import Space

        if threads is not None:
            torch.set_num_threads(threads)
        given = load_inputs(**inputs)
        with values.usage_error(TypeError, ValueError):
            space = Space.of(given.model, values.parse_method(method), layers, dict(map(_tuned, tune)))
        with values.usage_error(OSError, prefix="cannot write to the output folder: "):
            output.mkdir(parents=True, exist_ok=True)
        kind = getattr(torch, dtype)
        where = device or values.default_device()
        with values.usage_error(ValueError):
            split = (holdout, inputs["seed"], kind, where, workers)
            searched, held_out = split_images(given.images, given.transform, *split)
        model = given.model.to(where, kind)
        cost: Any = MacsShare(model)
        sample = searched[:1].expand(latency_batch_size, -1, -1, -1).contiguous()
        if budget_latency:
            cost = _latency(output / "latency.json", model, space, sample, latency_seconds)
        unit = "latency" if budget_latency else "MACs"
        seed = inputs["seed"]
        settings = {"model": inputs["model_name"], "data": str(inputs["data"]), "holdout": holdout}
        settings |= {"seed": seed, "dtype": dtype, "unit": unit}
        console = values.console()
        with Progress(console=console, transient=True) as progress:
            tasks: dict[float, Any] = {}

            def show(budget: float, done: int, least: float | None) -> None:
                text = f"{budget:.1%} of the {unit}" + ("" if least is None else f", KL {least:.4f}")
                if budget not in tasks:
                    tasks[budget] = progress.add_task(text, total=trials)
                progress.update(tasks[budget], completed=done, description=text)

            with values.usage_error(ValueError), _failed_search():
                result = run(
                    model,
                    space,
                    cost,
                    budget_macs or budget_latency,
                    searched,
                    storage=output / "trials.db",
                    held_out=held_out,
                    trials=trials,
                    batch_size=batch_size,
                    jobs=jobs,
                    seed=seed,
                    settings=settings,
                    on_progress=show,
                )
        checked = None
        if budget_latency:
            checked = cost.check(model, [best.schedule for best in result.best], sample, latency_seconds)
            for best, measured in zip(result.best, checked, strict=True):
                click.echo(f"of the dense latency: estimated {best.cost:.1%}, measured {measured:.1%}")
        origin = {"command": ctx.obj} | ({"device": device_name(torch.device(where))} if budget_latency else {})
        _write(output, result, origin, unit, checked)
        _print(console, result, f"{space.host.model}, {space.method.name}, {len(searched)} search images")
        click.echo(f"wrote {output}: search.json, front.png, " + ", ".join(map(_file, result.best)))


@contextmanager
def _failed_search() -> Iterator[None]:
    from tokenprune_ext.search import SearchError

    try:
        yield
    except SearchError as error:
        raise click.ClickException(str(error)) from error


def _tuned(text: str) -> tuple[str, list[Any]]:
    name, equals, choices = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"--tune {text!r}: expected option=value|value")
    return name, [values.literal(choice) for choice in choices.split("|")]


def _file(variant: Any) -> str:
    return f"schedule-{variant.budget:g}.json"


def _latency(path: Path, model: Any, space: Any, sample: Any, seconds: float) -> Any:
    """What was measured when this search began; measured now if it begins now."""
    from tokenprune_ext.latency import keep_freed_memory
    from tokenprune_ext.search.latency import LatencyShare

    keep_freed_memory(sample.device)  # for the check of what is found, too
    if path.exists():
        return LatencyShare.load(path, model)
    click.echo("measuring the latency of the blocks and of some pruned models", err=True)
    found = LatencyShare.measure(model, space, sample, seconds)
    found.save(path)
    return found


def _write(output: Path, result: SearchResult, origin: dict[str, str], unit: str, measured: list[float] | None) -> None:
    from dataclasses import replace

    from tokenprune_ext.report.front import front_figure

    for variant in result.best:
        replace(variant.schedule, origin={**origin, **variant.schedule.origin}).save(output / _file(variant))
    content = json.dumps({**origin, "unit": unit, "measured": measured, **result.to_dict()}, indent=2)
    (output / "search.json").write_text(content + "\n", "utf-8")
    label = {"MACs": "MACs of the blocks and of scoring", "latency": "estimated latency"}[unit]
    front_figure(output / "front.png", result, f"{label}, % of dense")


def _print(console: Any, result: SearchResult, title: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    for heading in ("budget", "schedule", "cost", "KL, search", "KL, held out", "agreement", "top-1 change", "tokens"):
        table.add_column(heading)
    for best in result.best:
        rivals = [variant for variant in result.uniform if variant.budget == best.budget]
        for variant in (best, *sorted(rivals, key=lambda rival: rival.kl)):
            judged = variant.held_out
            figures = ["-"] * 3
            if judged is not None:
                change, error = judged.top1_change, judged.top1_change_se
                figures = [f"{judged.kl:.4f} ± {judged.kl_se or 0:.4f}", f"{judged.agreement:.1%}", "-"]
                if change is not None:
                    figures[2] = f"{100 * change:+.1f} ± {100 * (error or 0):.1f}"
            kept = " ".join(f"{block}:{count}" for block, count in variant.schedule.keep.items())
            cost, kl = f"{variant.cost:.1%}", f"{variant.kl:.4f}"
            table.add_row(f"{variant.budget:.1%}", variant.name, cost, kl, *figures, kept)
        table.add_section()
    console.print(table)
