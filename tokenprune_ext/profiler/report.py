"""What a profile leaves behind: profile.json, figures, schedule files, and a page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune_ext.report import render

from . import plots
from .plots import Prediction
from .result import BatchProfile, Profile, ranges


def write_profile(
    profile: Profile,
    folder: str | Path,
    command: str,
    *,
    predicted: Mapping[int, Prediction] | None = None,
    checked: Mapping[int, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write everything into a folder, which is made if needed; files of the same names are replaced.

    Args:
        profile: what was measured.
        folder: where to write.
        command: the command line that repeats it.
        predicted: by batch size, (patch tokens, seconds) to draw over the staircase.
        checked: by batch size, what :func:`~tokenprune_ext.profiler.verify.verify` found.

    Returns:
        The paths that were written.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figures: dict[int, dict[str, bytes]] = {}
    for one in profile.batches:
        figures[one.batch_size] = _figures(profile, one, (predicted or {}).get(one.batch_size, ()))
        for name, png in figures[one.batch_size].items():
            path = folder / f"{name}_b{one.batch_size}.png"
            path.write_bytes(png)
            written.append(path)
        if one.schedule is not None:
            path = folder / f"schedule_b{one.batch_size}.json"
            one.schedule.save(path)
            written.append(path)
    content = {"command": command, **profile.to_dict(), "checked": dict(checked or {})}
    json_path, html_path = folder / "profile.json", folder / "report.html"
    json_path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    html_path.write_text(_page(profile, figures, command, checked or {}), "utf-8")
    return [*written, json_path, html_path]


def _figures(profile: Profile, one: BatchProfile, predicted: Prediction) -> dict[str, bytes]:
    figures = {"staircase": plots.staircase(profile, one, predicted)}
    if one.choice is not None:
        figures["accuracy"] = plots.accuracy(profile, one)
        figures["utility"] = plots.utility(profile, one)
    if one.blocks is not None:
        figures["blocks"] = plots.blocks(profile, one, one.blocks)
    return figures


def _page(
    profile: Profile, figures: Mapping[int, Mapping[str, bytes]], command: str, checked: Mapping[int, Any]
) -> str:
    images = {
        size: {name: "data:image/png;base64," + base64.b64encode(png).decode("ascii") for name, png in own.items()}
        for size, own in figures.items()
    }
    return render("profile.html.j2", profile=profile, images=images, command=command, checked=checked, ranges=ranges)
