"""Loads the compiled kernels. Without them every operator runs its plain-torch reference, and says so once."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REQUIRE = "TOKENPRUNE_REQUIRE_EXT"


@dataclass(frozen=True)
class Library:
    """One compiled library: ``problem`` is None when it is loaded, else the reason why not."""

    name: str
    path: Path
    problem: str | None

    @property
    def loaded(self) -> bool:
        return self.problem is None


def native() -> ModuleType | None:
    """The module ``_native``, or None when it was not built for this Python."""
    try:
        return importlib.import_module("tokenprune_ext._native")
    except ImportError:
        return None


def build_info() -> dict[str, Any]:
    """How the package was built (see ``_native.build_info``); empty when nothing was built."""
    module = native()
    return module.build_info() if module else {}


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA; a GPU need not be there."""
    return torch.version.cuda is not None


def _load(name: str, needs_cuda: bool) -> Library:
    path = Path(__file__).parent / f"{name}.so"
    problem = None
    if needs_cuda and not torch_has_cuda():
        problem = f"torch {torch.__version__} is built without CUDA"
    elif not path.exists():
        problem = "not built"
    else:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            problem = f"failed to load: {error}"
    return Library(name, path, problem)


def _explain(library: Library) -> str:
    built = build_info()
    versions = f"built against torch {built['torch']}, CUDA {built['cuda'] or 'none'}" if built else "nothing was built"
    running = f"running torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    return (
        f"tokenprune: {library.name} is not available ({library.problem}; {versions}; {running}). Its operators run in "
        "plain torch, slower. Reinstall with `pip install .`, and see `tokenprune info`."
    )


def _report(cpu: Library, cuda: Library) -> None:
    """An error for what ``TOKENPRUNE_REQUIRE_EXT`` demands, a warning for what this machine could have used."""
    required = os.environ.get(REQUIRE, "")
    if required not in ("", "cpu", "cuda"):
        raise ImportError(f"{REQUIRE} must be cpu or cuda, got {required!r}")
    demanded = {"": (), "cpu": (cpu,), "cuda": (cpu, cuda)}[required]
    for library in demanded:
        if not library.loaded:
            raise ImportError(f"{REQUIRE}={required}, but {_explain(library)}")
    useful = (cpu, cuda) if torch.cuda.is_available() else (cpu,)
    for library in useful:
        if not library.loaded:
            warnings.warn(_explain(library), RuntimeWarning, stacklevel=3)


def library_paths() -> tuple[Path, ...]:
    """The compiled libraries that a C++ program loads in place of this package, in this order.

    First the schemas of the operators, which only a process without Python may load; then the kernels, those for CUDA
    where this torch has it.
    """
    folder = Path(__file__).parent
    names = ("_C_schemas", "_C_cpu", *(("_C_cuda",) if torch_has_cuda() else ()))
    return tuple(path for name in names if (path := folder / f"{name}.so").exists())


def load() -> tuple[Library, Library]:
    """Load ``_C_cpu`` and ``_C_cuda``.

    Raises:
        ImportError: ``TOKENPRUNE_REQUIRE_EXT`` is ``cpu`` or ``cuda`` and a library it demands is not available.
    """
    cpu, cuda = _load("_C_cpu", needs_cuda=False), _load("_C_cuda", needs_cuda=True)
    _report(cpu, cuda)
    return cpu, cuda
