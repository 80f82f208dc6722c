"""`tokenprune visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokenprune_ext import cli_values as values

_MACS = 0.64


@click.command()
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--demo", is_flag=True, help="The model and the images that come with the package.")
@click.option("--model", "model_name", help="Any timm model name.")
@click.option("--img-size", type=click.IntRange(1), help="Side of the input in pixels.")
@values.weights_options
@click.option("--methods", default="topk,zero_tprune,tome,peaks", help="name[:option=value...], separated by commas.")
@values.pruning_options
@click.option(
    "--schedule",
    "schedules",
    type=values.ScheduleFile(),
    multiple=True,
    help="Schedule file as a further row; repeatable.",
)
@values.labels_option
@values.preprocess_options
@click.option("--limit", type=click.IntRange(1), default=4, help="At most so many images of a folder or list.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the choice of images.")
@click.option("--columns", type=click.IntRange(1), default=4, help="Pruning layers a figure shows at most.")
@click.option("--dpi", type=click.IntRange(50), default=300, help="Pixels an inch; a panel is 1.12 inches wide.")
@click.option("--panels", "single_panels", is_flag=True, help="Write every panel as a file of its own, too.")
@values.device_option
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tokenprune-pictures"),
    help="Folder for the figures and index.html.",
)
@click.pass_context
def visualize(
    ctx: click.Context,
    /,
    images: tuple[Path, ...],
    demo: bool,
    methods: str,
    schedules: tuple[Path, ...],
    device: Any,
    output: Path,
    layers: Any,
    keep: Any,
    macs: float | None,
    columns: int,
    dpi: int,
    single_panels: bool,
    **source: Any,
) -> None:
    """Draw which patches a pruned model keeps, merges and drops, and by which scores.

    IMAGES are image files, folders, or lists as `compare --data` takes them. Every image gets a figure of all methods
    side by side, one of their scores, and one of each method layer by layer. Without --keep and --macs, methods keep
    64 % of the blocks' MACs. With --methods "" only the schedules are drawn.
    """
    with values.explained():
        from rich.progress import Progress

        from tokenprune_ext import visualize as drawing

        chosen = values.parse_methods(methods)
        model, found, names, class_names, config, transform = (_demo if demo else _given)(images, **source)
        model = model.to(device or values.default_device())
        how = {"layers": layers, "keep": keep, "macs": _MACS if keep is macs is None else macs}
        with values.usage_error(TypeError, ValueError):
            variants, notes = drawing.prune_variants(model, chosen, values.load_schedules(schedules), **how)
        for note in notes:
            click.echo(f"note: {note}", err=True)
        with values.usage_error(OSError, prefix="cannot write the figures: "):
            with Progress(console=values.console(), transient=True) as progress:
                figures = drawing.visualize(
                    model,
                    variants,
                    found,
                    names,
                    transform,
                    output,
                    data_config=config,
                    class_names=class_names,
                    columns=columns,
                    dpi=dpi,
                    single_panels=single_panels,
                    progress=progress,
                )
            click.echo(f"wrote {drawing.write_page(output, figures, model, variants, ctx.obj, notes)}")


def _demo(images: tuple[Path, ...], limit: int, seed: int, **given: Any) -> tuple[Any, ...]:
    """The packaged model, its images, their names, the classes, and the preprocessing."""
    from tokenprune_ext import demo as embedded
    from tokenprune_ext.data import preprocessing

    if images or any(value is not None for name, value in given.items() if name != "pretrained") or given["pretrained"]:
        raise click.UsageError("--demo brings its own model and images: give none")
    model = embedded.load_model()
    found = embedded.DemoImages(limit, seed)
    return model, found, [f"image {i}" for i in range(limit)], embedded.CLASSES, *preprocessing(model)


def _given(
    images: tuple[Path, ...],
    model_name: str | None,
    weights: Path | None,
    pretrained: bool,
    img_size: int | None,
    labels: Path | None,
    limit: int,
    seed: int,
    **preprocess: Any,
) -> tuple[Any, ...]:
    """The same of what the command line names."""
    from tokenprune_ext.data import load_pictures, preprocessing, read_class_names, shown_names
    from tokenprune_ext.loading import load_model

    if model_name is None or not images:
        raise click.UsageError("give --model and images, or --demo")
    if (weights is None) == (not pretrained):
        raise click.UsageError("give either --weights FILE or --pretrained: pictures of random weights say nothing")
    model = load_model(model_name, weights=weights, pretrained=pretrained, img_size=img_size)
    classes = int(getattr(model, "num_classes", 0))
    class_names = None if labels is None else read_class_names(labels)
    found = load_pictures(images, classes, class_names=class_names, limit=limit, seed=seed)
    names = [file.name for file in found.files]
    shown = shown_names(found.class_names, classes)
    return model, found, names, shown, *preprocessing(model, img_size=img_size, **preprocess)
