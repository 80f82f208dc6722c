"""Checks of plain arguments of operators and methods. Each names the argument, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_int(name: str, value: object, low: int, high: int | None = None, why: str = "") -> None:
    """``value`` is an int with ``low <= value <= high``; ``why`` explains the upper bound."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}{f' ({why})' if why else ''}, got {value}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
