"""Whole models: dense with fused attention against every registered method at 65 % of the blocks' MACs.

Random weights: they decide which tokens are kept, not how long that takes. Eager first, since compiling takes minutes.
On a CPU, freed memory stays with the process (see latency.keep_freed_memory), and eager models also report which share
of the time goes into choosing, merging and gathering tokens: into the whole step, and into its operators alone.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from harness import append
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tokenprune_ext import apply, describe, methods
from tokenprune_ext.compare import DENSE, share
from tokenprune_ext.environment import environment
from tokenprune_ext.latency import keep_freed_memory, measure_latency
from tokenprune_ext.patch import block

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
BATCHES = (256, 1)
MACS = 0.65
EAGER = "eager"
CLASS_TOKEN = "dense, class token only"
SHARES = ("selection", "selection_operators", "selection_again")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Setting:
    """What is measured in one interleaved run; ``compiler`` is ``eager`` or a backend of torch.compile."""

    model: str
    batch: int
    compiler: str


def pruned_models(dense: nn.Module) -> dict[str, nn.Module]:
    """Every registered method by name, on copies that share the dense model's weights."""
    models = {CLASS_TOKEN: apply(share(dense), methods.create("dense", class_token_only=True))}
    for name in methods.available():
        if name == "dense":
            continue
        try:
            models[name] = apply(share(dense), name, macs=MACS)
        except ValueError as error:  # this method cannot do this model; others may
            click.echo(f"{name} left out: {error}", err=True)
    return models


def compiled(models: dict[str, nn.Module], backend: str) -> dict[str, nn.Module]:
    """Each as one graph. To torch they are variants of one forward: beyond a limit it would give up."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(models))
    return {name: torch.compile(model, backend=backend, fullgraph=True) for name, model in models.items()}


def selection_shares(model: nn.Module, images: torch.Tensor, rounds: int = 9) -> dict[str, float]:
    """Median share of a forward on a CPU that is spent in the methods: scores, selection, gathering, merging.

    ``selection`` is that share. ``selection_again`` is it when every layer's step runs a second time at once, which the
    forward is not charged for: with instructions and tokens in the cache, where the block's matrix products, which ran
    before the first time, have left nothing.
    """
    reduce = block._reduce
    times = [0.0, 0.0]

    def timed(*args: Any) -> Any:
        for i in range(2):
            start = time.perf_counter()
            state = reduce(*args)
            times[i] += time.perf_counter() - start
        return state

    shares = []
    with mock.patch.object(block, "_reduce", timed), torch.inference_mode():
        for _ in range(rounds):
            times[:] = 0.0, 0.0
            start = time.perf_counter()
            model(images)
            forward = time.perf_counter() - start - times[1]
            shares.append((times[0] / forward, times[1] / forward))
    first, again = (statistics.median(column) for column in zip(*shares, strict=True))
    return {"selection": first, "selection_again": again}


def operator_share(model: nn.Module, images: torch.Tensor, rounds: int = 9) -> float:
    """Median share of a forward on a CPU that is spent in the operators the methods call, as torch's profiler times
    them: without the Python between them, which a compiled model does not have.
    """
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            with record_function("forward"):
                model(images)
    shares = []
    for forward in profiler.events():
        if forward.name == "forward":
            steps = [event for event in forward.cpu_children if event.name.startswith("tokenprune ")]
            chosen = sum(operator.cpu_time_total for step in steps for operator in step.cpu_children)
            shares.append(chosen / forward.cpu_time_total)
    return statistics.median(shares)


def shares(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """What of a forward on a CPU goes into the methods, by :func:`selection_shares` and :func:`operator_share`."""
    return {**selection_shares(model, images), "selection_operators": operator_share(model, images)}


def page_faults(models: dict[str, nn.Module], images: torch.Tensor, rounds: int = 5) -> dict[str, float]:
    """Pages of memory the system hands out anew in a forward on a CPU, while the models run in turns: medians."""
    faults: dict[str, list[int]] = {name: [] for name in models}
    with torch.inference_mode():
        for _, (name, model) in itertools.product(range(rounds), models.items()):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            model(images)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {name: statistics.median(found) for name, found in faults.items()}


def end_to_end(dense: nn.Module, setting: Setting, device: str, dtype: torch.dtype, budget_s: float) -> list[dict]:
    """One record for the dense model and one a method.

    ``speedup`` is over dense in the same run; ``ideal`` is what it would be if time went with the whole model's MACs.
    """
    dense = dense.eval().to(device, dtype)
    fused = [module.fused_attn for module in dense.modules() if hasattr(module, "fused_attn")]
    assert fused, "no attention found in the dense model"
    assert all(fused), "the dense model must use fused attention: TIMM_FUSED_ATTN=1"
    models = {DENSE: dense, **pruned_models(dense)}
    macs = {name: describe(model) for name, model in models.items()}
    if setting.compiler != EAGER:
        models = compiled(models, setting.compiler)
    size = macs[DENSE].input_size
    images = torch.randn(setting.batch, 3, *size, device=device, dtype=dtype)
    latency = measure_latency(models, images, budget_s=budget_s)
    faults = page_faults(models, images) if device == "cpu" else {}
    synchronous = device == "cpu" and setting.compiler == EAGER
    records = []
    for name, found in latency.items():
        ideal = macs[name].dense_model_macs / macs[name].model_macs
        records.append(
            {
                "model": setting.model,
                "method": name,
                "batch": setting.batch,
                "compiler": setting.compiler,
                "dtype": str(dtype).removeprefix("torch."),
                "median_s": found.median_s,
                "q20_s": found.q20_s,
                "q80_s": found.q80_s,
                "rounds": len(found.rounds_s),
                "images_per_s": found.images_per_s,
                "blocks_macs_fraction": macs[name].blocks_macs / macs[name].dense_blocks_macs,
                "speedup": found.speedup,
                "ideal": ideal,
                "of_ideal": found.speedup / ideal,
                **({"page_faults": faults[name]} if faults else {}),
                **(shares(models[name], images) if synchronous else {}),
            }
        )
    return records


def show(records: list[dict[str, Any]]) -> None:
    measured = ("median ms", "speed-up", "ideal", "of ideal", "page faults", "selection", "operators", "again")
    table = Table("model", "batch", "compiler", "method", *measured)
    for record in records:
        table.add_row(
            record["model"],
            str(record["batch"]),
            record["compiler"],
            record["method"],
            f"{record['median_s'] * 1e3:.3f}",
            *(f"{record[key]:.3f} x" for key in ("speedup", "ideal")),
            f"{record['of_ideal']:.1%}",
            f"{record['page_faults']:.0f}" if "page_faults" in record else "",
            *(f"{record[key]:.1%}" if key in record else "" for key in SHARES),
        )
    Console(width=120).print(table)


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option(
    "--budget", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds a run of all methods."
)
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True, help="A timm model.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=BATCHES, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--compiler", "compilers", multiple=True, default=(EAGER, "inductor"), show_default=True)
@click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads(), show_default=True)
@click.option("--default-malloc", is_flag=True, help="On a CPU, let malloc hand memory back to the system.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(
    device: str,
    budget: float,
    models: tuple[str, ...],
    batches: tuple[int, ...],
    dtype: str,
    compilers: tuple[str, ...],
    threads: int,
    default_malloc: bool,
    output: Path | None,
) -> None:
    import timm

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if not default_malloc:
        keep_freed_memory(device)
    where = environment(torch.device(device))
    dense = {name: timm.create_model(name, pretrained=False) for name in models}
    for compiler, name, batch in itertools.product(compilers, models, batches):
        records = end_to_end(dense[name], Setting(name, batch, compiler), device, DTYPES[dtype], budget)
        if device == "cpu":
            records = [{**record, "default_malloc": default_malloc} for record in records]
        show(records)
        if output:
            append(output, records, where)


if __name__ == "__main__":
    main()
