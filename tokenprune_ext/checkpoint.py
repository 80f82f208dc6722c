"""A pruned model as one .safetensors file: its weights, its schedule, and how to build it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import methods
from .files import replacing
from .loading import ModelError, check_fit
from .patch import record_of
from .prune import apply, remove, schedule_of
from .recipe import RecipeError, build, recipe_of
from .schedule import Schedule

FORMAT = 1
_KEY = "tokenprune"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_log = logging.getLogger(__name__)


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, pruned or dense, to a .safetensors file that :func:`load` reads.

    The file holds the state dict, which other software reads as plain weights, and in its metadata the schedule and
    what the model is. To be sure of the latter it is built once, which takes the time of ``timm.create_model``. A
    model that is more than its name and arguments (a family of your own, changed modules) is saved too; loading it
    needs ``model=``, and a warning of the logger ``tokenprune_ext`` says why. The file is replaced in one step:
    whatever goes wrong, an older one stays whole.

    Raises:
        ModelError: another suffix, a model whose state dict holds more than plain tensors (a quantised one), or a
            wrapper (compiled, parallel) around a pruned model.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: a checkpoint is a .safetensors file")
    for name, part in model.named_modules():
        if part is not model and record_of(part) is not None:
            raise ModelError(f"the {name} of the model is pruned, not the model itself: save that")
    content: dict[str, Any] = {"format": FORMAT, "versions": _versions(), "schedule": None, "model": None}
    if record_of(model) is not None:
        content["schedule"] = json.loads(schedule_of(model).to_json())
    state = _plain_state(model)
    try:
        content["model"] = recipe_of(model)
    except RecipeError as error:
        content["why_no_model"] = str(error)
        _log.warning("%s: loading it needs model=...: %s", path, error)
    with replacing(path) as file:
        save_file(_unshared(state), file, {"format": "pt", _KEY: json.dumps(content)})


def load(path: str | Path, model: nn.Module | None = None, *, device: torch.device | str | None = None) -> nn.Module:
    """Read what :func:`save` wrote: the model with its weights, pruned as it was.

    Nothing is downloaded and no code in the file is run.

    Args:
        path: the file.
        model: where to load to: it gets the weights, and the schedule in place of one it had; its mode stays. Needed
            where the file cannot say what the model is. By default the model is built anew, in eval mode.
        device: where the model goes; by default the CPU for a new model, and nowhere for a given one.

    Raises:
        ModelError: no such file, not written by :func:`save`, damaged, of another format; the installed libraries
            cannot build its model; keys, shapes or dtypes that do not fit; a method that is not registered; or a
            schedule that does not fit. A given model is left as it was.
    """
    path = Path(path)
    content, state = _read(path)
    schedule = _schedule(content, path)
    if model is None:
        model, name = _build(content, state, path)
    else:
        _plain_state(model)
        name = type(model).__name__
    check_fit(model, state, path, name, dtypes=True)
    try:
        # Before the weights: it may refuse the model and then leaves it as it was; copying cannot fail any more.
        model = remove(model) if schedule is None else apply(model, schedule)
    except (TypeError, ValueError) as error:
        raise ModelError(f"checkpoint {path}: its schedule does not fit {name}: {error}") from error
    with torch.no_grad():
        model.load_state_dict(state)
    return model if device is None else model.to(device)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("tokenprune", "torch", "timm", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, if safetensors can hold it."""
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise ModelError(
                f"{name} is no plain tensor with values but {_kind_text(value)}; a quantised model is saved before it "
                "is quantised, and quantised again after loading"
            )
    return state


def _kind_text(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} on {value.device}, {value.layout}" if isinstance(value, Tensor) else kind


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own on the CPU: a tied one is stored under each of its names."""
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        storage = value.untyped_storage().data_ptr()
        found[name] = (value.clone() if storage in seen else value).contiguous().cpu()
        seen.add(storage)
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix.lower() in _PICKLED:
        raise ModelError(
            f"{path} is pickled, which can run code and is not read; convert it: "
            f"tokenprune.save(tokenprune_ext.loading.load_model(NAME, weights={path.name!r}), 'NAME.safetensors')"
        )
    if not path.is_file():
        raise ModelError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read checkpoint {path}: {error}") from error
    if _KEY not in about:
        raise ModelError(
            f"{path} holds weights alone, or was not written by tokenprune.save: load it with "
            "tokenprune_ext.loading.load_model(NAME, weights=FILE)"
        )
    try:
        content = json.loads(about[_KEY])
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read checkpoint {path}: its description is damaged ({error!r})") from error
    if version != FORMAT:
        written = content.get("versions", {}).get("tokenprune")
        raise ModelError(f"checkpoint {path} has format {version} (tokenprune {written}); this version reads {FORMAT}")
    return content, state


def _schedule(content: Mapping[str, Any], path: Path) -> Schedule | None:
    stored = content.get("schedule")
    if stored is None:
        return None
    try:
        return Schedule.from_json(json.dumps(stored))
    except (TypeError, ValueError) as error:
        name = stored.get("method") if isinstance(stored, dict) else None
        hint = "" if name in methods.available(trained=True) else "; import the module that registers it first"
        raise ModelError(f"checkpoint {path}: its schedule cannot be read: {error}{hint}") from error


def _build(content: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, str]:
    """The model a checkpoint describes, and its name for messages."""
    recipe = content.get("model")
    if recipe is None:
        why = content.get("why_no_model")
        raise ModelError(f"checkpoint {path} cannot say how to build its model: pass it as model=... ({why})")
    try:
        return build(recipe, {key: value.dtype for key, value in state.items()}), recipe["name"]
    except ModelError as error:
        raise ModelError(f"checkpoint {path}: its model cannot be built: {error}") from error
