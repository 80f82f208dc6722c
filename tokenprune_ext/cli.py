"""The `tokenprune` command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tokenprune_ext import (
    __version__,
    cli_compare,
    cli_eval,
    cli_export,
    cli_predict,
    cli_profile,
    cli_search,
    cli_train,
    cli_visualize,
)
from tokenprune_ext import cli_values as values


class _Group(click.Group):
    """Keeps the command line, so that a report can say how it was made."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = shlex.join(["tokenprune", *args])
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Prune tokens of pretrained vision transformers and see what it costs and what it gains."""


@main.command()
@values.model_options
@click.option("--method", help="name[:option=value...]")
@values.pruning_options
@click.option("--schedule", type=values.ScheduleFile(), help="Schedule file or preset instead of --method.")
def describe(model_name: str, img_size: int | None, method: str | None, schedule: Path | None, **how: Any) -> None:
    """Tokens and MACs of every block, of the dense model or as it is pruned."""
    with values.explained():
        from tokenprune_ext import prune
        from tokenprune_ext.loading import load_model

        pruning = values.parse_pruning(method, schedule, how)
        model = load_model(model_name, img_size=img_size)
        with values.usage_error(TypeError, ValueError):
            if pruning is not None:
                prune.apply(model, pruning, **how)
            click.echo(str(prune.describe(model)))


@main.command()
@values.model_options
@click.option("--method", help="name[:option=value...]")
@values.pruning_options
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Schedule file to write."
)
def schedule(model_name: str, img_size: int | None, method: str | None, output: Path, **how: Any) -> None:
    """Write a schedule file: how many tokens each layer keeps."""
    if method is None:
        raise click.UsageError("Missing option '--method'.")
    with values.explained():
        from tokenprune_ext.loading import load_model
        from tokenprune_ext.schedule import Schedule

        pruning = values.parse_method(method)
        model = load_model(model_name, img_size=img_size)
        with values.usage_error(TypeError, ValueError, OSError):
            built = Schedule.build(model, pruning, **how)
            built.save(output)
        kept = ", ".join(f"{count} at block {block}" for block, count in built.keep.items()) or "all"
        click.echo(f"wrote {output}: {built.method}, patch tokens kept: {kept}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """What is installed, built and found on this machine."""
    from tokenprune_ext.info import collect

    found = collect()
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in found.items():
        entries = value if isinstance(value, Mapping) else {"": value}
        for number, (name, entry) in enumerate(entries.items()):
            text = entry if isinstance(entry, str) else json.dumps(entry, default=str)
            table.add_row(key if number == 0 else "", str(name), text)
        table.add_section()
    values.console().print(table)


main.add_command(cli_compare.compare)
main.add_command(cli_compare.demo)
main.add_command(cli_eval.evaluate)
main.add_command(cli_export.export)
main.add_command(cli_predict.predict)
main.add_command(cli_profile.profile)
main.add_command(cli_search.search)
main.add_command(cli_train.train)
main.add_command(cli_visualize.visualize)

if __name__ == "__main__":
    main()
