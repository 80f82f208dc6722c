"""Report of a comparison: report.json with every figure, and report.html that needs no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune_ext.compare import Comparison


def write_report(comparison: Comparison, folder: str | Path, command: str) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, which is made if needed.

    Args:
        comparison: what was measured.
        folder: where to write; files of these names are replaced.
        command: the command line that repeats the comparison.

    Returns:
        The paths of report.json and report.html.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "report.json", folder / "report.html"
    figures = {"command": command, **comparison.to_dict()}
    json_path.write_text(json.dumps(figures, indent=2, default=str) + "\n", "utf-8")
    html_path.write_text(render_html(comparison, command), "utf-8")
    return json_path, html_path


def render_html(comparison: Comparison, command: str) -> str:
    """The HTML report as a string; everything it shows is inside it."""
    from tokenprune_ext.report import figures, panels, pictures, plots, table

    def draw(picture: pictures.Picture, stage: pictures.Stage) -> str:
        cell = panels.cell_size(stage.source.shape, 280)  # twice what the page shows, for dense screens
        return pictures.data_uri(panels.draw_tokens(picture.pixels, stage.source, cell))

    return render(
        "template.html.j2",
        comparison=comparison,
        command=command,
        columns=table.COLUMNS,
        macs_plot=plots.plot_macs(comparison.rows),
        speedup_plot=plots.plot_speedup(comparison.rows),
        draw=draw,
        data_uri=pictures.data_uri,
        spread=figures.spread,
    )


def render(template: str, **context: Any) -> str:
    """A template of this folder, filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("tokenprune_ext", "report"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
