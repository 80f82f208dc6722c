"""Registers, shared memory and spills of every CUDA kernel, from what ptxas said in a build log.

usage: pip wheel -v --no-deps . 2>&1 | tee build.log; python bench/kernel_resources.py build.log [--json FILE]

Shared memory is the static part; `wpr` takes its matrix's size on top when it is launched. Fails when a kernel spills
registers or when the log names no kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names: list[str]) -> list[str]:
    found = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    short = (
        re.sub(r"\(.*|void |tokenprune::|\(anonymous namespace\)::", "", name) for name in found.stdout.split("\n")
    )
    return list(short)[: len(names)]


def parse(log: str) -> list[dict[str, object]]:
    """One record a kernel and architecture."""
    records: list[dict[str, object]] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            records.append(
                {"kernel": entry[1], "arch": entry[2], "registers": 0, "shared": 0, "stack": 0, "spilled": 0}
            )
        elif records and (spill := SPILL.search(line)):
            records[-1] |= {"stack": int(spill[1]), "spilled": int(spill[2]) + int(spill[3])}
        elif records and (used := USED.search(line)):
            shared = SHARED.search(line)
            records[-1] |= {"registers": int(used[1]), "shared": int(shared[1]) if shared else 0}
    for record, name in zip(records, demangle([str(record["kernel"]) for record in records]), strict=True):
        record["kernel"] = name
    return sorted(records, key=lambda record: (str(record["kernel"]), str(record["arch"])))


@click.command(help=__doc__)
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the records to this file too.")
def main(log: Path, output: Path | None) -> None:
    records = parse(log.read_text(errors="replace"))
    if not records:
        sys.exit(f"{log} names no CUDA kernel: was it a build with nvcc?")
    archs = sorted({str(record["arch"]) for record in records})
    table = Table("kernel", *(f"{arch}: registers / shared bytes" for arch in archs), "spilled bytes")
    for name in dict.fromkeys(str(record["kernel"]) for record in records):
        mine = {str(record["arch"]): record for record in records if record["kernel"] == name}
        cells = [f"{mine[arch]['registers']} / {mine[arch]['shared']}" if arch in mine else "-" for arch in archs]
        table.add_row(name, *cells, str(sum(int(str(record["spilled"])) for record in mine.values())))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if output:
        output.write_text(json.dumps(records, indent=1))
    if any(record["spilled"] for record in records):
        sys.exit("a kernel spills registers")


if __name__ == "__main__":
    main()
