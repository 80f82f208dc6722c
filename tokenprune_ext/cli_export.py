"""`tokenprune export`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenprune_ext import cli_values as values
from tokenprune_ext.cli_values import FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

_SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
_DETAILS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@click.command()
@values.model_options
@values.weights_options
@click.option("--method", help="name[:option=value...]; without it and --schedule the dense model.")
@values.pruning_options
@click.option("--schedule", type=values.ScheduleFile(), help="Schedule file or preset instead of --method.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(_SUFFIXES)),
    help="pt2: a torch.export program; aoti: compiled, runs from C++ too; onnx.  [default: onnx for .onnx]",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help=".pt2 or .onnx file.")
@click.option("--batch-size", type=click.IntRange(1), help="Images at a time, always.  [default: any number]")
@click.option("--opset", type=int, default=18, help="Of ONNX.")
@values.device_option
@click.option("--dtype", type=click.Choice(list(_TOLERANCE)), default="float32", help="Of weights and inputs.")
@click.option("--labels", type=FILE, help="Names of the classes in the model's order, one per line, to keep beside it.")
@values.preprocess_options
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Images to check it on.  [default: random ones]"
)
@click.option("--limit", type=click.IntRange(1), default=4, help="At most so many images.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Difference that is no error, as a share of the largest output.  [default: by --dtype]",
)
def export(
    model_name: str,
    img_size: int | None,
    weights: Path | None,
    pretrained: bool,
    method: str | None,
    schedule: Path | None,
    layers: Any,
    keep: Any,
    macs: float | None,
    kind: str | None,
    output: Path,
    batch_size: int | None,
    opset: int,
    device: Any,
    dtype: str,
    labels: Path | None,
    data: Path | None,
    limit: int,
    tolerance: float | None,
    **preprocess: Any,
) -> None:
    """Write a model, dense or pruned, as a program for other run times, and check what was written.

    The file is loaded again and its outputs are compared with the model's. docs/deploy_cpp.md runs one from C++.
    """
    kind = _checked_kind(kind, output)
    with values.explained():
        import torch

        from tokenprune_ext import prune
        from tokenprune_ext.data import load_pictures, preprocessing, read_class_names, shown_names
        from tokenprune_ext.loading import load_model

        how = {"layers": layers, "keep": keep, "macs": macs}
        pruning = values.parse_pruning(method, schedule, how)
        model: Any = load_model(model_name, weights=weights, pretrained=pretrained, img_size=img_size)
        if weights is None and not pretrained:
            click.echo("note: the weights are random; --weights FILE or --pretrained gives trained ones", err=True)
        config, transform = preprocessing(model, img_size=img_size, **preprocess)
        classes = shown_names(None if labels is None else read_class_names(labels), int(model.num_classes))
        if classes and len(classes) != model.num_classes:
            raise click.UsageError(f"--labels names {len(classes)} classes, and the model has {model.num_classes}")
        details = {**{name: config[name] for name in _DETAILS}, "classes": classes and "\n".join(classes)}
        if data is None:
            images = torch.randn(limit, *config["input_size"], generator=torch.Generator().manual_seed(0))
        else:
            found = load_pictures((data,), int(model.num_classes), limit=limit, seed=0)
            images = torch.stack([transform(found[number][0]) for number in range(len(found))])
        if batch_size is not None:
            images = images[torch.arange(batch_size) % len(images)]
        model.to(device or values.default_device(), getattr(torch, dtype))
        images = images.to(next(model.parameters()))
        with values.usage_error(TypeError, ValueError, OSError, ImportError):
            if pruning is not None:
                prune.apply(model, pruning, **how)
            start = time.perf_counter()
            run = _write(kind, model, output, images, batch=batch_size, opset=opset, details=details)
        size = sum(file.stat().st_size for file in (output, Path(f"{output}.data")) if file.is_file())
        click.echo(f"wrote {output}: {kind}, {size / 2**20:.1f} MiB, {time.perf_counter() - start:.0f} s")
        _compare(model, run, images, _TOLERANCE[dtype] if tolerance is None else tolerance)


def _checked_kind(kind: str | None, output: Path) -> str:
    """The format, which the suffix decides where it can."""
    fitting = [name for name, suffix in _SUFFIXES.items() if suffix == output.suffix]
    if not fitting:
        raise click.UsageError(f"--output {output}: expected a .pt2 or .onnx file")
    if kind is None and len(fitting) > 1:
        raise click.UsageError(f"a {output.suffix} file holds either: give --format {' or --format '.join(fitting)}")
    if kind is not None and kind not in fitting:
        raise click.UsageError(f"--format {kind} is written to a {_SUFFIXES[kind]} file, not to {output}")
    if not output.parent.is_dir():
        raise click.UsageError(f"cannot write {output}: no such folder")
    return kind or fitting[0]


def _write(
    kind: str, model: nn.Module, output: Path, images: Tensor, *, batch: int | None, opset: int, details: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Write the file and load it again."""
    if kind == "onnx":
        from tokenprune_ext.export.onnx import export_onnx

        export_onnx(model, output, batch=batch, opset=opset, images=images)
        return _onnx_program(output)
    from tokenprune_ext.export import export_package, export_program, load_program

    write = export_program if kind == "pt2" else export_package
    write(model, output, batch=batch, images=images, details=details)
    return load_program(output)


def _onnx_program(path: Path) -> Callable[[Tensor], Tensor]:
    import torch

    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        needed = "pip install 'tokenprune[export]'"
        raise click.ClickException(f"wrote {path}, but checking it needs {error.name}: {needed}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])


def _compare(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, tolerance: float) -> None:
    import torch

    with torch.no_grad():
        expected = model(images).float().cpu()
    given = run(images).float().cpu()
    difference, largest = (given - expected).abs().max().item(), expected.abs().max().item()
    same = (given.argmax(-1) == expected.argmax(-1)).float().mean().item()
    text = f"largest difference to the model {difference:.2g}, where its largest output is {largest:.3g}"
    click.echo(f"checked on {len(images)} images: {text}; {same:.0%} have the same largest output")
    if not difference <= tolerance * largest:
        raise click.ClickException(f"the difference is more than {tolerance:g} of the largest output (--tolerance)")
