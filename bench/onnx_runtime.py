"""ONNX files in onnxruntime on a CPU: the dense model against every registered method at 65 % of the blocks' MACs.

Random weights, all files timed in turn in one run, with the same budget for torch.compile when --compiled is given.
--table prints what is in docs/onnx.md instead: how many nodes of each operator every method needs.
"""

from __future__ import annotations

import tempfile
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


def session(path: Path, threads: int, profile: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = profile
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def call(runner: Any, images: torch.Tensor) -> Callable[[], object]:
    return partial(runner.run, None, {INPUT: images.numpy()})


def timed(models: dict[str, nn.Module], batch: int, threads: int, budget_s: float) -> list[dict[str, Any]]:
    """One record a model; ``speedup`` is over the dense file, ``ideal`` by the MACs of the whole model."""
    images = torch.randn(batch, 3, *describe(models[DENSE]).input_size)
    with tempfile.TemporaryDirectory() as folder:
        files = exported(models, Path(folder))
        calls = {name: call(session(file.path, threads), images) for name, file in files.items()}
        with torch.inference_mode():
            for name, model in models.items():
                torch.testing.assert_close(torch.from_numpy(calls[name]()[0]), model(images), rtol=1e-3, atol=1e-4)
        times = time_in_turns(calls, budget_s=budget_s)
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


@click.command(help=__doc__)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds for all rounds.")
@click.option("--method", "chosen", multiple=True, help="Only these beside the dense model (repeatable).")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(batch: int, threads: int, budget: float, chosen: tuple[str, ...], output: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    dense = timm.create_model(MODEL, pretrained=False).eval()
    models = {DENSE: dense, **pruned_models(dense)}
    if chosen:
        models = {name: model for name, model in models.items() if name == DENSE or name in chosen}
    records = timed(models, batch, threads, budget)
    show(records)
    if output:
        append(output, records, environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
