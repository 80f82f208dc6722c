"""What choosing and merging tokens costs a whole model: every method against a twin that keeps the first tokens.

The twin has as many tokens in every block and looks at none of them, so the difference is the method: scores,
selection, merging, and attention with a bias where tokens count as often as the patches they stand for. Unlike the
share that end_to_end.py reports, it is known of compiled models and on a GPU too. Both are timed in turns, in one run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click
import torch
from end_to_end import DTYPES, EAGER, MACS, Setting, compiled
from harness import append
from rich.console import Console
from rich.table import Table
from torch import nn

from tokenprune_ext import Schedule, apply, methods
from tokenprune_ext.compare import share
from tokenprune_ext.environment import environment
from tokenprune_ext.latency import keep_freed_memory, measure_latency
from tokenprune_ext.patch.context import AttentionContext, Reduced

TWIN = "first_tokens"


@methods.register
@dataclass(frozen=True, kw_only=True)
class FirstTokens(methods.Method):
    """Keeps the first patch tokens, where another method would prune."""

    name: ClassVar[str] = TWIN
    needs_training: ClassVar[bool] = True  # keeps it out of the methods that others list

    place: str = "attention"

    @property
    def where(self) -> Literal["attention", "block"]:
        return "block" if self.place == "block" else "attention"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return ()

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        last = ctx.num_prefix + keep
        kept = torch.arange(ctx.num_prefix, last, device=ctx.x.device).expand(ctx.x.shape[0], -1)
        return Reduced(ctx.x[:, :last].contiguous(), kept)

    def scoring_macs(self, *_: Any) -> int:
        return 0


def twin_of(schedule: Schedule) -> Schedule:
    """The same tokens in every block, without a choice."""
    method = schedule.build_method()
    options = {"place": method.where, "class_token_only": method.class_token_only}
    return dataclasses.replace(schedule, method=TWIN, options=options)


def selection_costs(
    dense: nn.Module, setting: Setting, device: str, dtype: torch.dtype, budget_s: float
) -> Iterator[dict[str, Any]]:
    """One record a method: medians of both models, and the part of the method's that its twin saves."""
    dense = dense.eval().to(device, dtype)
    for name in methods.available():
        if name == "dense":
            continue
        try:
            schedule = Schedule.build(dense, name, macs=MACS)
        except ValueError as error:  # this method cannot do this model; others may
            click.echo(f"{name} left out: {error}", err=True)
            continue
        models = {of: apply(share(dense), plan) for of, plan in ((name, schedule), (TWIN, twin_of(schedule)))}
        if setting.compiler != EAGER:
            models = compiled(models, setting.compiler)
        images = torch.randn(setting.batch, 3, *schedule.input_size, device=device, dtype=dtype)
        median = {of: found.median_s for of, found in measure_latency(models, images, budget_s=budget_s).items()}
        yield {
            **dataclasses.asdict(setting),
            "method": name,
            "dtype": str(dtype).removeprefix("torch."),
            "median_s": median[name],
            "first_tokens_s": median[TWIN],
            "cost": 1 - median[TWIN] / median[name],
        }


def show(records: list[dict[str, Any]]) -> None:
    table = Table("model", "batch", "compiler", "method", "median ms", "first tokens ms", "cost")
    for record in records:
        setting = (record["model"], str(record["batch"]), record["compiler"], record["method"])
        times = (f"{record[key] * 1e3:.3f}" for key in ("median_s", "first_tokens_s"))
        table.add_row(*setting, *times, f"{record['cost']:.1%}")
    Console(width=120).print(table)


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=3.0, show_default=True, help="Seconds a method.")
@click.option("--model", default="deit_small_patch16_224", show_default=True, help="A timm model.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(256, 1), show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--compiler", "compilers", multiple=True, default=(EAGER, "inductor"), show_default=True)
@click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads(), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(
    device: str,
    budget: float,
    model: str,
    batches: tuple[int, ...],
    dtype: str,
    compilers: tuple[str, ...],
    threads: int,
    output: Path | None,
) -> None:
    import timm

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    keep_freed_memory(device)
    where = environment(torch.device(device))
    dense = timm.create_model(model, pretrained=False)
    for compiler, batch in itertools.product(compilers, batches):
        records = list(selection_costs(dense, Setting(model, batch, compiler), device, DTYPES[dtype], budget))
        show(records)
        if output:
            append(output, records, where)


if __name__ == "__main__":
    main()
