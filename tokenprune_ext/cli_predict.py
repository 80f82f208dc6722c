"""`tokenprune predict`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_values import FILE


@click.command()
@values.model_options
@click.option("--on", "device", required=True, help="a100, a100-40gb, orin, tx2, h100, h200, or a JSON file.")
@click.option("--batch-sizes", type=values.Counts(), default="1,2,4", help="Images at a time, one or more.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "tf32", "float32"]),
    default="float16",
    help="Of weights and activations; tf32 is float32 on tensor cores.",
)
@click.option("--layer", type=click.IntRange(0), help="0-based block that prunes.  [default: a quarter of the depth]")
@click.option(
    "--min-fall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    help="How much an edge falls, as a share of the unpruned latency.",
)
@click.option("--measured", type=FILE, help="profile.json to compare with, or CSV or JSON lines of tokens, latency_s.")
@click.option("--tolerance", type=click.IntRange(0), default=2, help="Tokens between an edge and a measured one.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tokenprune-predict"),
    help="Folder for predictions.json and predictions.png.",
)
def predict(
    model_name: str,
    img_size: int | None,
    device: str,
    batch_sizes: tuple[int, ...],
    dtype: str,
    layer: int | None,
    min_fall: float,
    measured: Path | None,
    tolerance: int,
    output: Path,
) -> None:
    """Where the latency of a device would fall as tokens are pruned: on paper, without the device.

    The result is a model of the device, not a measurement; docs/predict.md says what it leaves out.
    """
    if measured is not None and len(batch_sizes) > 1:
        raise click.UsageError("--measured is compared with one batch size: give the one that was measured")
    with values.explained():
        import torch

        from tokenprune_ext.loading import load_model
        from tokenprune_ext.profiler import fit
        from tokenprune_ext.profiler.device import DeviceError, load_device
        from tokenprune_ext.profiler.predict import SOURCE
        from tokenprune_ext.profiler.predict import predict as run
        from tokenprune_ext.profiler.predict_plots import overlay_figure, prediction_figure

        found = None
        with values.usage_error(DeviceError, TypeError, ValueError):
            described = load_device(device)
            profile = None if measured is None else fit.read_measured(measured, batch_sizes[0])
            with torch.device("meta"):  # shapes are enough
                model = load_model(model_name, img_size=img_size)
            predictions = [
                run(model, described, batch_size=size, dtype=dtype, layer=layer, min_fall=min_fall)
                for size in batch_sizes
            ]
            if profile is not None:
                found = fit.match(predictions[0], profile, tolerance=tolerance, min_fall=min_fall)
        for prediction in predictions:
            _print(prediction)
        click.echo(SOURCE)
        if found is not None:
            click.echo(
                f"predicted edges: {list(found.predicted)}, measured: {list(found.measured)}; precision "
                f"{_share(found.precision)}, recall {_share(found.recall)}, correlation {_share(found.correlation)}"
            )
        with values.usage_error(OSError, prefix="cannot write the prediction: "):
            output.mkdir(parents=True, exist_ok=True)
            content: dict[str, Any] = {"predictions": [prediction.as_json() for prediction in predictions]}
            if found is None or profile is None:
                prediction_figure(output / "predictions.png", predictions)
            else:
                content["match"] = asdict(found)
                overlay_figure(output / "predictions.png", predictions[0], profile, found)
            (output / "predictions.json").write_text(json.dumps(content) + "\n", "utf-8")
        for name in ("predictions.json", "predictions.png"):
            click.echo(f"wrote {output / name}")


def _print(prediction: Any) -> None:
    from rich.table import Table

    table = Table(
        *("patch tokens", "with prefix", "pruned", "latency ms", "fall", "kernels that get faster"),
        title=f"{prediction.model} on {prediction.device}, {prediction.dtype}, batch {prediction.batch_size}: "
        f"predicted edges, pruning at block {prediction.layer}",
    )
    for edge in reversed(prediction.edges):
        table.add_row(
            str(edge.tokens),
            str(prediction.num_prefix_tokens + edge.tokens),
            str(prediction.tokens[-1] - edge.tokens),
            f"{prediction.latency_s[prediction.tokens.index(edge.tokens)] * 1e3:.4g}",
            f"{edge.fall:.1%}",
            ", ".join(edge.kernels),
        )
    values.console().print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
