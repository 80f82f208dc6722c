"""The record of a measurement: JSON lines that are written at once, so that an interrupted run loses nothing."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .points import Point

FORMAT = 1
_HEADER = "tokenprune profile"


class ProfileError(ValueError):
    """A profile that cannot be made, continued or read; the message says why."""


class Records:
    """Visits and accuracies that are known, in memory."""

    def __init__(self) -> None:
        self.visits: dict[tuple[Point, int], tuple[float, ...]] = {}
        self.sections: dict[str, dict[str, Any]] = {}
        self.accuracy: dict[int, dict[str, Any]] = {}

    def add_visit(self, point: Point, number: int, times_s: list[float]) -> None:
        """Visit ``number`` of a point: the seconds of every call."""
        self._write({"point": list(point), "round": number, "times_s": times_s})

    def add_accuracy(self, tokens: int, values: Mapping[str, Any]) -> None:
        """What was measured of the model that keeps ``tokens`` patch tokens."""
        self._write({"accuracy": dict(values), "tokens": tokens})

    def begin(self, section: str, settings: Mapping[str, Any]) -> None:
        """Begin, or continue, a part of the measurement that depends on settings.

        Raises:
            ProfileError: the part was begun with other settings; the message names those that differ.
        """
        wanted = _plain(settings)
        known = self.sections.get(section)
        if known is None:
            self._write({"section": section, "settings": wanted})
            return
        differing = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if differing:
            said = "; ".join(f"{name}: {known.get(name)!r} there, {wanted.get(name)!r} now" for name in differing)
            raise ProfileError(f"{self} was made with other {section}: {said}. Give those, or another output")

    def _write(self, record: dict[str, Any]) -> None:
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if "point" in record:
            kind, batch_size, tokens = record["point"]
            self.visits[Point(kind, batch_size, tokens), record["round"]] = tuple(record["times_s"])
        elif "accuracy" in record:
            self.accuracy[record["tokens"]] = record["accuracy"]
        else:
            self.sections[record["section"]] = record["settings"]

    def __str__(self) -> str:
        return "the record"


class Journal(Records):
    """Records in a file, one JSON object a line; the first says what the file is.

    A last line that was not finished is cut off when the file is opened. One process writes a file at a time.

    Raises:
        ProfileError: the file is no profile, a line other than the last is damaged, or another process writes it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ProfileError(
                f"{self.path} is being written by another run: wait for it, or give another output"
            ) from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        header = _line({_HEADER: FORMAT})
        if not content or (header.startswith(content) and content != header):  # a first line that was not finished
            self._file.truncate(0)
            self._append(header)
            return
        lines = content.split(b"\n")
        if lines[0] + b"\n" != header:
            raise ProfileError(f"{self.path} is no profile: its first line is not {header.decode().strip()}")
        for number, line in enumerate(lines[1:-1], start=2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ProfileError(f"{self.path}, line {number} is damaged: {error!r}") from error
        if lines[-1]:  # every finished line ends in a newline
            self._file.truncate(len(content) - len(lines[-1]))

    def _write(self, record: dict[str, Any]) -> None:
        self._append(_line(record))
        self._take(record)

    def _append(self, line: bytes) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()

    def __str__(self) -> str:
        return str(self.path)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from the file."""
    return json.loads(json.dumps(settings))
