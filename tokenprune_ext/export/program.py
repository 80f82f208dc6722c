"""Models as files: torch.export programs, AOTInductor packages, and the one call that loads either."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tokenprune_ext import __version__
from tokenprune_ext.patch import inspect_host, record_of
from tokenprune_ext.schedule import Schedule

from .graph import captured

SUFFIX = ".pt2"
_DETAILS = "tokenprune.json"  # in a program; a package has a place of its own


def export_program(
    model: nn.Module,
    path: str | Path,
    *,
    batch: int | None = None,
    images: Tensor | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as a torch.export program: a graph, for Python and for whatever else compiles such graphs.

    It calls ``torch.ops.tokenprune.*`` as the model does, on the model's device. The model is left as it is.

    Args:
        model: a supported model in eval mode, pruned or not.
        path: file to write, ``.pt2``; replaced when it is there, and only by a complete one.
        batch: images the program takes at a time; any number from 1 on by default.
        images: example ``[B, C, H, W]`` on the model's device and in its dtype; random by default. The program takes
            images of this height and width.
        details: what else to keep beside the graph, such as ``mean``, ``std`` and ``classes``. Texts are kept as they
            are, anything else as JSON, None not at all.

    Returns:
        The path.

    Raises:
        UnsupportedModelError: the model is not understood.
        ValueError: another suffix, a model in training mode, ``batch`` below 1, or images that do not fit.
        FileNotFoundError: the folder does not exist. Nothing is written in any of these cases.
    """
    target, program, facts = _exported(model, path, batch, images, details)
    program.example_inputs = None  # would be written too: somebody's images
    with _replacing(target) as file:
        torch.export.save(program, file, extra_files={_DETAILS: json.dumps(facts)})
    return target


def export_package(
    model: nn.Module,
    path: str | Path,
    *,
    batch: int | None = None,
    images: Tensor | None = None,
    details: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a model with AOTInductor into a package that runs from Python and from C++, on the model's device.

    A package holds machine code: it is for this kind of processor or GPU and this version of torch. Arguments, result
    and errors are those of :func:`export_program`, and ``options`` are ``torch._inductor.config`` values.
    """
    target, program, facts = _exported(model, path, batch, images, details)
    configs = {**(options or {}), "aot_inductor.metadata": facts}
    with _replacing(target) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)
    return target


@dataclass(frozen=True)
class LoadedProgram:
    """What a file holds; calling it runs the model on images, without gradients.

    Attributes:
        module: what runs.
        details: texts by name: ``model``, ``schedule`` (JSON, of a pruned model), ``input_size`` (JSON), ``batch`` (a
            number, or ``any``), ``dtype``, ``device``, ``returns`` (a type), ``torch``, ``tokenprune``, and what was
            given at the export.
    """

    module: Callable[[Tensor], Any]
    details: dict[str, str]

    @property
    def schedule(self) -> Schedule | None:
        """How the model prunes; None for a dense model."""
        text = self.details.get("schedule")
        return None if text is None else Schedule.from_json(text)

    def __call__(self, images: Tensor) -> Any:
        self._check(images)
        with torch.no_grad():
            return self.module(images)

    def _check(self, images: Tensor) -> None:
        """Compiled code does not look at what it is given, and would read past its end."""
        size, batch = json.loads(self.details["input_size"]), self.details["batch"]
        if list(images.shape[1:]) != size or (batch != "any" and len(images) != int(batch)) or len(images) == 0:
            count = "B" if batch == "any" else batch
            raise ValueError(f"images must be [{count}, {', '.join(map(str, size))}], got {list(images.shape)}")
        if images.dtype != getattr(torch, self.details["dtype"]):
            raise ValueError(f"images must be {self.details['dtype']}, got {images.dtype}")
        if images.device.type != self.details["device"]:
            raise ValueError(f"images must be on {self.details['device']}, got {images.device}")


def load_program(path: str | Path) -> LoadedProgram:
    """Load what :func:`export_program` or :func:`export_package` wrote, in any process that can import this package.

    A program is unpickled in part and a package is machine code: load files you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither; the message says what is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such program: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            texts = [archive.read(name) for name in names if name.endswith(f"/extra/{_DETAILS}")]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no program and no package: {error}") from error
    package = None
    if any("/data/aotinductor/" in name for name in names):
        package = torch._inductor.aoti_load_package(str(path))
    details = package.get_metadata() if package else json.loads(texts[0]) if texts else {}
    missing = [name for name in ("input_size", "batch", "dtype", "device", "returns") if name not in details]
    if missing:
        raise ValueError(f"{path} was not written by tokenprune: it does not say its {', '.join(missing)}")
    if details["returns"].startswith("transformers."):
        import_module(details["returns"].rpartition(".")[0])  # which tells torch what the type is made of
    return LoadedProgram(package or torch.export.load(path).module(), details)


def _exported(
    model: nn.Module, path: str | Path, batch: int | None, images: Tensor | None, details: Mapping[str, Any] | None
) -> tuple[Path, ExportedProgram, dict[str, str]]:
    """Where to write, the graph, and what to keep beside it."""
    target = Path(path)
    if target.suffix != SUFFIX:
        raise ValueError(f"path must end in {SUFFIX}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    program = captured(model, images, batch=batch)
    example = program.example_inputs[0][0]
    record, returned = record_of(model), program.call_spec.out_spec.type
    facts = {
        "model": inspect_host(model).model,
        "schedule": None if record is None else record.to_json(),
        "input_size": list(example.shape[1:]),
        "batch": str(batch or "any"),
        "dtype": str(example.dtype).removeprefix("torch."),
        "device": example.device.type,
        "returns": "Tensor" if returned is None else f"{returned.__module__}.{returned.__qualname__}",
        "torch": torch.__version__,
        "tokenprune": __version__,
    }
    taken = sorted(facts.keys() & (details or {}).keys())
    if taken:
        raise ValueError(f"details must not have {', '.join(taken)}: the export says what they are")
    kept = {name: value for name, value in {**facts, **(details or {})}.items() if value is not None}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in kept.items()}
    return target, program, texts


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file to write, of the same name, that takes the target's place when it is complete."""
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        file = Path(folder) / target.name
        yield file
        os.replace(file, target)
