"""The folder of a training run: its settings, its checkpoint, and who may write there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from tokenprune_ext.files import replacing

FORMAT = 1
CHECKPOINT, SETTINGS, MODEL = "checkpoint.pt", "run.json", "model.safetensors"
_ABSENT = "not set"


class RunError(ValueError):
    """A run that cannot be started or resumed; nothing was written."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no finite number any more; the message names the last good checkpoint."""


def digest(model: nn.Module) -> str:
    """Of the names, shapes and values of a state dict."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        plain = value.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def resumable(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in `folder`, None where there is none yet. Nothing is written.

    Raises:
        RunError: the folder is something else's, another run's, or its checkpoint cannot be read.
    """
    if not folder.exists():
        if not folder.parent.is_dir():
            raise RunError(f"cannot write {folder}: no such folder as {folder.parent}")
        return None
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; the output of a run is a folder")
    if not (folder / SETTINGS).is_file():
        if any(not file.name.startswith(".") for file in folder.iterdir()):  # a run killed at once leaves such names
            raise RunError(f"{folder} is not empty and holds no training run: choose another folder")
        return None
    try:
        started = json.loads((folder / SETTINGS).read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read {folder / SETTINGS}: {error!r}") from error
    _check_same(started, settings, folder)
    return _load(folder / CHECKPOINT, settings) if (folder / CHECKPOINT).exists() else None


def _load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, started = content["format"], content["settings"]
    except Exception as error:  # the reader raises a dozen types for a damaged file
        raise RunError(
            f"cannot read checkpoint {path}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if version != FORMAT:
        raise RunError(f"checkpoint {path} has format {version}; this version reads {FORMAT}")
    _check_same(started, settings, path)
    return content


def _check_same(started: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    changed = [
        f"{name} was {started.get(name, _ABSENT)} and is now {settings.get(name, _ABSENT)}"
        for name in {**started, **settings}
        if started.get(name, _ABSENT) != settings.get(name, _ABSENT)
    ]
    if changed:
        raise RunError(
            f"{where} is of another run: {'; '.join(changed)}. Resume with its settings or choose another folder"
        )


def claim(folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> IO[str]:
    """Make the folder this run's and write the settings; nobody else can until the file that is returned is closed.

    Raises:
        RunError: another process trains there, or nothing can be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except BlockingIOError:
            lock.close()
            raise RunError(f"another process is training in {folder}") from None
        for left in folder.glob(".*-*"):  # files that a killed run was writing
            shutil.rmtree(left, ignore_errors=True)
        with replacing(folder / SETTINGS) as file:
            file.write_text(json.dumps({"settings": settings, **facts}, indent=2, default=str) + "\n", "utf-8")
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error}") from error
    return lock


def save(folder: Path, settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Replace the checkpoint in one step."""
    with replacing(folder / CHECKPOINT) as file:
        torch.save({"format": FORMAT, "settings": dict(settings), **content}, file)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back, so that they can be compared with what was written."""
    return json.loads(json.dumps(settings, default=str))
