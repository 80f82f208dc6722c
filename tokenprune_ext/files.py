"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to write, which takes the target's place at the end of the block; after an error the old one stays.

    It has the target's name, in a folder of its own beside it; what else is written there moves along.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        yield Path(folder) / target.name
        readable = 0o666 & ~_umask()
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):  # itself at last
            with file.open("rb") as written:
                os.fsync(written.fileno())  # else a crash of the machine could leave the new name without its content
            file.chmod(readable)  # some libraries write for the owner alone
            os.replace(file, target.parent / file.name)


def _umask() -> int:
    """Which rights new files do not get; it can only be read by being set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
