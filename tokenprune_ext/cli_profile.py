"""`tokenprune profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_values import FILE

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_JOURNAL = "profile.jsonl"
_DRIFTED = 0.1  # of a checked schedule, beyond which it is said


@click.command()
@values.model_options
@values.weights_options
@click.option("--method", default="pomt", help="name[:option=value...] of what prunes, at one layer.")
@click.option("--layer", type=click.IntRange(0), help="0-based block that prunes.  [default: the method's]")
@click.option(
    "--mode",
    type=click.Choice(["deployed", "paper"]),
    default="deployed",
    help="Time the model as the method prunes it, or random removal at the first layer.",
)
@click.option("--batch-sizes", type=values.Counts(), default="1", help="Images of a forward pass, like 1,2,4.")
@values.device_option
@click.option(
    "--dtype",
    type=click.Choice([*_DTYPES, *_DTYPES.values()]),
    default="float32",
    help="Weights and inputs are cast to it.",
)
@values.threads_option
@click.option("--cuda-graph", is_flag=True, help="Replay forward passes as CUDA graphs.")
@click.option("--stride", type=click.IntRange(1), default=1, help="Distance of the token counts.")
@click.option("--coarse", type=click.IntRange(2), help="Start with this distance and refine around steps.")
@click.option("--min-tokens", type=click.IntRange(1), help="Fewest tokens.  [default: the fewest the method leaves]")
@click.option("--rounds", type=click.IntRange(3), default=5, help="Visits of each token count.")
@click.option("--visit-seconds", type=click.FloatRange(0, min_open=True), default=0.1, help="Timed calls of a visit.")
@click.option("--blocks/--no-blocks", default=True, help="Measure the latency of single blocks too.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Images for the accuracy: folder of class folders, folder of images, or TSV. Without them no R is chosen.",
)
@values.labels_option
@values.unlabelled_option
@click.option("--limit", type=click.IntRange(1), default=500, help="At most so many images, balanced over the classes.")
@click.option("--accuracy-stride", type=click.IntRange(1), default=4, help="Distance of the counts that are evaluated.")
@click.option("--eval-batch-size", type=click.IntRange(1), default=32, help="Images at once for the accuracy.")
@values.preprocess_options
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, help="Weight of latency; 1 looks at nothing else.")
@click.option("--verify/--no-verify", default=False, help="Time the schedule again, in turns with the dense model.")
@click.option("--predicted", type=FILE, help="predictions.json of tokenprune predict, drawn over the staircases.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of visits, removed tokens and the choice of images.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tokenprune-profile"),
    help="Folder for the profile, the schedules, figures and report.html; an interrupted run continues there.",
)
@click.pass_context
def profile(
    ctx: click.Context,
    /,
    model_name: str,
    img_size: int | None,
    weights: Path | None,
    pretrained: bool,
    method: str,
    batch_sizes: tuple[int, ...],
    device: Any,
    dtype: str,
    threads: int | None,
    visit_seconds: float,
    data: Path | None,
    alpha: float,
    accuracy_stride: int,
    verify: bool,
    predicted: Path | None,
    seed: int,
    output: Path,
    **options: Any,
) -> None:
    """Measure latency at every token count, find its steps, and choose how many tokens to remove.

    On GPUs latency falls in steps as tokens are removed (the tail effect). The schedule that is written keeps the
    token count of the best utility of latency and accuracy; R = 0 where nothing beats the dense model.
    """
    if weights is not None and pretrained:
        raise click.UsageError("give --weights FILE or --pretrained, not both")
    if data is not None and weights is None and not pretrained:
        raise click.UsageError("--data needs --weights FILE or --pretrained: accuracy of random weights says nothing")
    if verify and (data is None or options["mode"] != "deployed"):
        raise click.UsageError("--verify needs --data, so that there is a schedule, and --mode deployed")
    with values.explained():
        import torch
        from rich.progress import Progress

        from tokenprune_ext import profiler
        from tokenprune_ext.latency import keep_freed_memory
        from tokenprune_ext.loading import load_model
        from tokenprune_ext.profiler.report import write_profile
        from tokenprune_ext.profiler.verify import verify as check

        if threads is not None:
            torch.set_num_threads(threads)
        with values.usage_error(OSError, prefix="cannot write the profile: "):
            output.mkdir(parents=True, exist_ok=True)  # before minutes of work
        torch.manual_seed(seed)  # of random weights
        model = load_model(model_name, weights=weights, pretrained=pretrained, img_size=img_size)
        kind = getattr(torch, _DTYPES.get(dtype, dtype))
        names = ("mode", "layer", "cuda_graph", "stride", "coarse", "min_tokens", "rounds", "blocks")
        chosen = {name: options.pop(name) for name in names}
        with values.usage_error(TypeError, ValueError):
            settings = profiler.Settings.build(
                model,
                method=values.parse_method(method),
                batch_sizes=batch_sizes,
                dtype=kind,
                visit_s=visit_seconds,
                seed=seed,
                **chosen,
            )
        staircases = {} if predicted is None else _staircases(predicted)
        batches = () if data is None else _batches(model, data, seed, img_size, **options)
        where = device or values.default_device()
        keep_freed_memory(where)
        model = model.to(where, kind)
        with (
            values.usage_error(ImportError, ValueError),
            values.usage_error(OSError, prefix="cannot write the profile: "),
        ):
            with Progress(console=values.console(), transient=True) as progress:
                found = profiler.profile(
                    model,
                    settings,
                    output / _JOURNAL,
                    batches=batches,
                    accuracy_stride=accuracy_stride,
                    alpha=alpha,
                    origin={"command": ctx.obj},
                    progress=progress,
                )
            checked = {one.batch_size: check(model, settings, one) for one in found.batches} if verify else {}
            written = write_profile(found, output, ctx.obj, checked=checked, predicted=staircases)
    _say(found, checked)
    for path in written:
        click.echo(f"wrote {path}")


def _staircases(path: Path) -> dict[int, list[tuple[int, float]]]:
    """By batch size, what `tokenprune predict` wrote: (patch tokens, seconds)."""
    with values.usage_error(ValueError, KeyError, TypeError, prefix=f"--predicted {path} is no predictions.json: "):
        made = json.loads(path.read_text("utf-8"))["predictions"]
        return {one["batch_size"]: list(zip(one["tokens"], one["latency_s"], strict=True)) for one in made}


def _batches(
    model: Any,
    data: Path,
    seed: int,
    img_size: int | None,
    labels: Path | None,
    unlabelled: bool,
    limit: int,
    eval_batch_size: int,
    **preprocess: Any,
) -> list[Any]:
    """The images of the accuracy, preprocessed once for all token counts."""
    from tokenprune_ext.data import batches, load_images, preprocessing, read_class_names

    names = None if labels is None else read_class_names(labels)
    classes = int(getattr(model, "num_classes", 0))
    if not classes:
        raise click.UsageError("--data needs a model with a classifier")
    images = load_images(data, classes, class_names=names, unlabelled=unlabelled).choose(limit, seed)
    _, transform = preprocessing(model, img_size=img_size, **preprocess)
    return list(batches(images, transform, eval_batch_size))


def _say(found: Any, checked: dict[int, dict[str, float]]) -> None:
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for one in found.batches:
        choice = one.choice
        if choice is not None and choice.removed:
            click.echo(
                f"batch {one.batch_size}: R = {choice.removed}, {choice.tokens} patch tokens kept, "
                f"{1e3 * choice.latency_s:.3f} ms, dense {1e3 * choice.dense_latency_s:.3f} ms "
                f"({choice.speedup:.2f} times as fast)"
            )
        if one.batch_size in checked:
            off = checked[one.batch_size]["deviation"]
            far = ": more than 10 %, profile again on a quiet machine" if abs(off) > _DRIFTED else ""
            click.echo(f"batch {one.batch_size}: checked in turns with dense, {100 * off:+.1f} % off the profile{far}")
