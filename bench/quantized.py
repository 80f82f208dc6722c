"""Accuracy and speed of a model that is pruned, cast or quantised, and both at once.

The reference of all figures is the dense float32 model; all models run in one process, interleaved. Accuracy is that of
the eager models. torchao quantises for torch.compile (--compile), torch.ao for eager mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from harness import append
from torch import Tensor, nn

from tokenprune_ext import apply
from tokenprune_ext.cli_images import input_options, load_inputs
from tokenprune_ext.cli_values import explained, parse_methods
from tokenprune_ext.compare import DENSE, macs_of, share
from tokenprune_ext.data import batches
from tokenprune_ext.environment import environment
from tokenprune_ext.evaluate import evaluate
from tokenprune_ext.latency import keep_freed_memory, measure_latency, quantile

FLOAT = "float32"


class Cast(nn.Module):
    """Takes float32 images, like the other models."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype))


def torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return quantise


def torch_ao(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# What a model becomes, by name; each gets a copy of its own.
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FLOAT: lambda model: model,
    "bfloat16": lambda model: Cast(model, torch.bfloat16),
    "torch.ao-dynamic": torch_ao,
    "int8-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "int8-weight-only": torchao("Int8WeightOnlyConfig"),
}


def variants(dense: nn.Module, methods: dict[str, Any], macs: float, kinds: tuple[str, ...]) -> dict[str, nn.Module]:
    """Every method in every kind, by ``method, kind``; the first is the dense float32 model."""
    pruned = {DENSE: dense, **{name: apply(share(dense), method, macs=macs) for name, method in methods.items()}}
    for name, model in pruned.items():
        click.echo(f"{name}: {macs_of(model).charged_fraction:.1%} of the blocks' MACs", err=True)
    kinds = (FLOAT, *(kind for kind in kinds if kind != FLOAT))
    return {f"{name}, {kind}": KINDS[kind](copy.deepcopy(model)) for kind in kinds for name, model in pruned.items()}


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| | | top-1, points | KL | time, of dense float32 (20 % - 80 % of the rounds) | of dense of its kind |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        change, error = record["top1_change"], record["top1_change_se"]
        first = record["kind"] == FLOAT and record["method"] == DENSE
        points = "" if first or change is None else f"{100 * change:+.1f} ± {100 * error:.1f}"
        kl = "" if first else f"{record['kl']:.3f}"
        lines.append(
            f"| {record['kind'] if record['method'] == DENSE else ''} | `{record['method']}` | {points} | {kl} "
            f"| {record['time']:.2f} ({record['time_q20']:.2f} - {record['time_q80']:.2f}) "
            f"| {record['time_alike']:.2f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@input_options
@click.option("--methods", default="auto,topk,zero_tprune,tome,pomt", show_default=True)
@click.option("--macs", type=click.FloatRange(0, 1, min_open=True), default=0.65, show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="float32 is always there.")
@click.option("--compile", "compiled", is_flag=True, help="Time the models compiled by inductor.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=120.0, show_default=True, help="Seconds of the timing.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(
    methods: str,
    macs: float,
    kinds: str,
    compiled: bool,
    batch_size: int,
    threads: int,
    budget: float,
    output: Path | None,
    **inputs: Any,
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    keep_freed_memory("cpu")
    wanted = tuple(kinds.split(","))
    if not set(wanted) <= set(KINDS):
        raise click.UsageError(f"--kinds: expected some of {', '.join(KINDS)}")
    with explained():
        loaded = load_inputs(**inputs)
        models = variants(loaded.model, parse_methods(methods), macs, wanted)
        accuracy = evaluate(models, batches(loaded.images, batch_size=batch_size, transform=loaded.transform))
    images = next(iter(batches(loaded.images, batch_size=batch_size, transform=loaded.transform)))[0]
    if compiled:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(models))
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
    latency = measure_latency(models, images, budget_s=budget)
    records = []
    for name, found in accuracy.items():
        method, kind = name.rsplit(", ", 1)
        figures = {"images": found.images, "top1": found.top1, "top1_change": found.top1_change}
        figures |= {"top1_change_se": found.top1_change_se, "agreement": found.agreement, "kl": found.kl}
        rounds = latency[name].rounds_s
        figures |= {"median_s": latency[name].median_s, "rounds": len(rounds)}
        for key, other in (("time", f"{DENSE}, {FLOAT}"), ("time_alike", f"{DENSE}, {kind}")):
            # Round by round: on a busy machine the speed changes from round to round by more than within one.
            ratios = [mine / theirs for mine, theirs in zip(rounds, latency[other].rounds_s, strict=True)]
            figures |= {key: quantile(ratios, 0.5), f"{key}_q20": quantile(ratios, 0.2)}
            figures |= {f"{key}_q80": quantile(ratios, 0.8)}
        run = {"macs": macs, "batch": batch_size, "compiled": compiled}
        records.append({"method": method, "kind": kind, **run, **figures})
    where = environment(torch.device("cpu"))
    how = "compiled" if compiled else "eager"
    click.echo(f"{where['device']}, {threads} threads, batch {batch_size}, {how}, {len(loaded.images)} images")
    click.echo(table(records))
    if output:
        append(output, records, where)


if __name__ == "__main__":
    main()
