"""Token pruning for vision transformers.

``torch.ops.tokenprune.*`` exist once this package is imported; :func:`apply` prunes a pretrained model. What patches
models needs timm and is imported on first use, so that the operators work without it.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from . import ops
from ._loader import library_paths
from ._loader import load as _load_libraries

if TYPE_CHECKING:
    from . import methods as methods
    from . import presets as presets
    from .checkpoint import load, save
    from .patch import UnsupportedModelError as UnsupportedModelError
    from .patch import restore as restore
    from .prune import Description, Trace, apply, describe, remove, schedule_of, trace
    from .schedule import Schedule

try:
    __version__ = metadata.version("tokenprune")
except metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

LIBRARIES = _load_libraries()

_HOMES = {
    "Description": "prune",
    "Schedule": "schedule",
    "Trace": "prune",
    "UnsupportedModelError": "patch",
    "apply": "prune",
    "describe": "prune",
    "load": "checkpoint",
    "remove": "prune",
    "restore": "patch",
    "save": "checkpoint",
    "schedule_of": "prune",
    "trace": "prune",
}

__all__ = [
    "LIBRARIES",
    "Description",
    "Schedule",
    "Trace",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "describe",
    "library_paths",
    "load",
    "methods",
    "ops",
    "presets",
    "remove",
    "restore",
    "save",
    "schedule_of",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "presets"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
