"""docs/deploy.md: every way to run a pruned model elsewhere, with every method and family of models, each run once."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "python_tests"))

from deploy_paths import CASES, FAMILIES, LONG_CASES, PATHS, build_cpp, compiled, cpp, pruned  # noqa: E402

MARK = "<!-- the table of bench/deploy_table.py -->"


def outcome(path: Callable[..., None], host: str, method: str) -> str:
    """``yes``, or the first line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path(pruned(host, method), Path(folder))
        except Exception as error:
            return f"no: {str(error).strip().splitlines()[0]}"
    return "yes"


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "deploy.md", show_default=True)
def main(output: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        long: dict[str, Any] = {
            "torch.compile": compiled,
            "C++ (AOTInductor)": partial(cpp, program=build_cpp(Path(folder))),
        }
        rows = [["model", "method", *long, *PATHS], ["---"] * (2 + len(long) + len(PATHS))]
        for host, method in track(CASES):
            cells = [outcome(path, host, method) if (host, method) in LONG_CASES else "" for path in long.values()]
            cells += [outcome(path, host, method) for path in PATHS.values()]
            rows.append([FAMILIES[host], f"`{method}`", *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before, _, after = output.read_text("utf-8").split(MARK)
    output.write_text(f"{before}{MARK}\n\n{table}\n\n{MARK}{after}", "utf-8")
    failed = sum(cell.startswith("no") for row in rows for cell in row)
    click.echo(f"{output}: {len(CASES)} models, {failed} failures")


if __name__ == "__main__":
    main()
