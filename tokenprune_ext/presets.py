"""Schedules that come with the package, each with how it was found in its ``origin``."""

from __future__ import annotations

from pathlib import Path

from .schedule import Schedule

FOLDER = Path(__file__).with_name("schedules")


def available() -> tuple[str, ...]:
    """Names of the schedules, sorted: the method, then the model, then which one."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load(name: str) -> Schedule:
    """The schedule of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in available():
        raise ValueError(f"no preset {name!r}; available: {', '.join(available())}")
    return Schedule.load(FOLDER / f"{name}.json")
