"""ONNX files in onnxruntime on a CPU: the dense model against every registered method at 65 % of the blocks' MACs.

Random weights; all files are timed in turn in one run, and each is first compared with the model. On a machine that
others use too, --clock cpu counts the seconds that this process computed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import timm
import torch
from end_to_end import pruned_models
from harness import append
from rich.console import Console
from rich.table import Table
from torch import nn

from tokenprune_ext import describe
from tokenprune_ext.compare import DENSE
from tokenprune_ext.environment import environment
from tokenprune_ext.export.onnx import INPUT, OnnxSummary, export_onnx
from tokenprune_ext.latency import quantile, time_in_turns

MODEL = "deit_small_patch16_224"


def exported(models: dict[str, nn.Module], folder: Path) -> dict[str, OnnxSummary]:
    return {name: export_onnx(model, folder / f"{number}.onnx") for number, (name, model) in enumerate(models.items())}


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def call(runner: Any, images: torch.Tensor) -> Callable[[], object]:
    return partial(runner.run, None, {INPUT: images.numpy()})


def cpu_time(timed_call: Callable[[], object]) -> float:
    """Seconds that all threads of this process computed during a call."""
    start = time.process_time()
    timed_call()
    return time.process_time() - start


def timed(
    models: dict[str, nn.Module], files: dict[str, OnnxSummary], batch: int, threads: int, clock: str, budget_s: float
) -> list[dict[str, Any]]:
    """One record a model; ``speedup`` is over the dense file, ``ideal`` by the MACs of the whole model."""
    images = torch.randn(batch, 3, *describe(models[DENSE]).input_size)
    calls = {name: call(session(file.path, threads), images) for name, file in files.items()}
    with torch.inference_mode():
        for name, model in models.items():
            torch.testing.assert_close(torch.from_numpy(calls[name]()[0]), model(images), rtol=1e-3, atol=1e-4)
    times = time_in_turns(calls, budget_s=budget_s, clock=cpu_time if clock == "cpu" else None)
    dense = quantile(times[DENSE], 0.5)
    records = []
    for name, rounds in times.items():
        macs = describe(models[name])
        ideal = macs.dense_model_macs / macs.model_macs
        speedup = dense / quantile(rounds, 0.5)
        records.append(
            {
                "model": MODEL,
                "runtime": "onnxruntime",
                "method": name,
                "batch": batch,
                "clock": clock,
                "median_s": quantile(rounds, 0.5),
                "q20_s": quantile(rounds, 0.2),
                "q80_s": quantile(rounds, 0.8),
                "rounds": len(rounds),
                "speedup": speedup,
                "ideal": ideal,
                "of_ideal": speedup / ideal,
                "nodes": sum(files[name].operators.values()),
            }
        )
    return records


def show(records: list[dict[str, Any]]) -> None:
    table = Table("batch", "method", "median ms", "20 % - 80 %", "speed-up", "ideal", "of ideal", "nodes")
    for record in records:
        table.add_row(
            str(record["batch"]),
            record["method"],
            f"{record['median_s'] * 1e3:.1f}",
            f"{record['q20_s'] * 1e3:.1f} - {record['q80_s'] * 1e3:.1f}",
            *(f"{record[key]:.3f} x" for key in ("speedup", "ideal")),
            f"{record['of_ideal']:.1%}",
            str(record["nodes"]),
        )
    Console(width=110).print(table)


def operator_table(files: dict[str, OnnxSummary]) -> str:
    """Markdown: how many nodes of each operator every file has."""
    rows = [["operator", *files], ["---"] * (1 + len(files))]
    for name in sorted({name for file in files.values() for name in file.operators}):
        rows.append([f"`{name}`", *(str(file.operators.get(name, "")) for file in files.values())])
    rows.append(["all", *(str(sum(file.operators.values())) for file in files.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@click.command(help=__doc__)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds for all rounds.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--table", is_flag=True, help="Also print how many nodes of each operator the files have, as markdown.")
@click.option("--method", "chosen", multiple=True, help="Only these beside the dense model (repeatable).")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(
    batch: int,
    threads: int,
    budget: float,
    clock: str,
    table: bool,
    chosen: tuple[str, ...],
    output: Path | None,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    dense = timm.create_model(MODEL, pretrained=False).eval()
    models = {DENSE: dense, **pruned_models(dense)}
    if chosen:
        models = {name: model for name, model in models.items() if name == DENSE or name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        files = exported(models, Path(folder))
        records = timed(models, files, batch, threads, clock, budget)
    show(records)
    if table:
        click.echo(operator_table(files))
    if output:
        append(output, records, environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
