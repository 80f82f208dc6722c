"""Registers, shared memory and spills of every CUDA kernel, from what ptxas said in a build log.

usage: pip wheel -v --no-deps . 2>&1 | tee build.log; python bench/kernel_resources.py build.log

Shared memory is the static part; `wpr` takes its matrix's size on top when it is launched. Fails when a kernel spills
registers or when the log names no kernel. With --check it also fails on a kernel that the recorded table does not have,
on one that is no longer built, and on one that needs over 8 registers more; all other differences are only shown, as is
everything but a spill when another nvcc made the record.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tokenprune_ext.launches import shorten

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
NVCC = re.compile(r"The CUDA compiler identification is NVIDIA (\d[\d.]*)")  # CMake, when it configures anew

MORE_REGISTERS = 8  # that a kernel may take before its record has to be renewed: less is the compiler's mood


@dataclass(frozen=True, order=True)
class Kernel:
    """What one kernel takes on one architecture; ``shared``, ``stack`` and ``spilled`` in bytes."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel} on {self.arch}"


@dataclass(frozen=True)
class Record:
    """The kernels of a build, sorted, and the compiler that made them."""

    nvcc: str
    kernels: list[Kernel]


@dataclass(frozen=True)
class Difference:
    text: str
    error: bool


def demangle(names: list[str]) -> list[str]:
    found = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    return [shorten(name) for name in found.stdout.split("\n")][: len(names)]


def parse(log: str) -> list[Kernel]:
    """One entry a kernel and architecture, sorted; the worst figures where several files instantiate it."""
    entries: list[tuple[str, str]] = []
    figures: list[dict[str, int]] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            entries.append((entry[1], entry[2]))
            figures.append({"registers": 0, "shared": 0, "stack": 0, "spilled": 0})
        elif figures and (spill := SPILL.search(line)):
            # A line each for the kernel and for every function that it calls and that is not inlined.
            figures[-1]["stack"] = max(figures[-1]["stack"], int(spill[1]))
            figures[-1]["spilled"] += int(spill[2]) + int(spill[3])
        elif figures and (used := USED.search(line)):
            shared = SHARED.search(line)
            figures[-1] |= {"registers": int(used[1]), "shared": int(shared[1]) if shared else 0}
    worst: dict[tuple[str, str], dict[str, int]] = {}
    for name, (_, arch), found in zip(demangle([name for name, _ in entries]), entries, figures, strict=True):
        so_far = worst.setdefault((name, arch), found)
        worst[name, arch] = {key: max(value, so_far[key]) for key, value in found.items()}
    return sorted(Kernel(name, arch, **found) for (name, arch), found in worst.items())


def nvcc_version(log: str) -> str:
    """The compiler's version as the log has it, else that of the nvcc on PATH."""
    if found := NVCC.search(log):
        return found[1]
    try:
        said = subprocess.run(["nvcc", "--version"], text=True, capture_output=True, check=True).stdout
    except OSError:
        sys.exit("the log does not say which nvcc made it, and there is none here to ask")
    if found := re.search(r"\bV(\d[\d.]*)", said):
        return found[1]
    sys.exit(f"nvcc --version names no version:\n{said}")


def read(file: Path) -> Record:
    content = json.loads(file.read_text())
    return Record(content["nvcc"], [Kernel(**kernel) for kernel in content["kernels"]])


def write(file: Path, record: Record) -> None:
    """One kernel and architecture a line: a change shows as a line of the diff."""
    lines = ",\n".join(f"  {json.dumps(asdict(kernel))}" for kernel in record.kernels)
    file.write_text(f'{{\n "nvcc": {json.dumps(record.nvcc)},\n "kernels": [\n{lines}\n ]\n}}\n')


def spills(kernels: list[Kernel]) -> list[str]:
    return [f"{kernel.name}: spilled {kernel.spilled}" for kernel in kernels if kernel.spilled]


def differences(built: Record, recorded: Record) -> Iterator[Difference]:
    """Every figure that is not as recorded, and every spill."""
    same_nvcc = built.nvcc == recorded.nvcc
    now = {kernel.name: kernel for kernel in built.kernels}
    before = {kernel.name: kernel for kernel in recorded.kernels}
    for name in sorted(now.keys() | before.keys()):
        if name not in before:
            text = f"{name}: not in the table, now registers {now[name].registers}, spilled {now[name].spilled}"
            yield Difference(text, error=same_nvcc or now[name].spilled > 0)
        elif name not in now:
            yield Difference(f"{name}: no longer built, was registers {before[name].registers}", error=same_nvcc)
        else:
            for figure in ("registers", "shared", "stack", "spilled"):
                old, new = getattr(before[name], figure), getattr(now[name], figure)
                is_spill = figure == "spilled" and new > 0
                too_many = figure == "registers" and new > old + MORE_REGISTERS
                if old != new or is_spill:
                    yield Difference(f"{name}: {figure} {old} -> {new}", error=is_spill or (too_many and same_nvcc))


def check(built: Record, recorded: Record) -> list[str]:
    """Prints what differs from the record and is no error; returns what is one."""
    if built.nvcc != recorded.nvcc:
        print(f"recorded with nvcc {recorded.nvcc}, built with nvcc {built.nvcc}: only spills are errors")
    found = list(differences(built, recorded))
    for difference in found:
        if not difference.error:
            print(difference.text)
    print(f"built: {len(built.kernels)} kernels, recorded: {len(recorded.kernels)}, differences: {len(found)}")
    return [difference.text for difference in found if difference.error]


def show(kernels: list[Kernel]) -> None:
    archs = sorted({kernel.arch for kernel in kernels})
    table = Table("kernel", *(f"{arch}: registers / shared bytes" for arch in archs), "spilled bytes")
    for name in dict.fromkeys(kernel.kernel for kernel in kernels):
        mine = {kernel.arch: kernel for kernel in kernels if kernel.kernel == name}
        cells = [f"{mine[arch].registers} / {mine[arch].shared}" if arch in mine else "-" for arch in archs]
        table.add_row(name, *cells, str(sum(kernel.spilled for kernel in mine.values())))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@click.command(help=__doc__)
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", "table", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with it.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the table to this file.")
def main(log: Path, table: Path | None, output: Path | None) -> None:
    text = log.read_text(errors="replace")
    kernels = parse(text)
    if not kernels:
        sys.exit(f"{log} names no CUDA kernel: was it a build with nvcc?")
    show(kernels)
    errors = check(Record(nvcc_version(text), kernels), read(table)) if table else spills(kernels)
    if output:
        write(output, Record(nvcc_version(text), kernels))
    if errors:
        sys.exit("\n".join(["", "Not as it should be (--json renews the table; no kernel may spill):", *errors]))


if __name__ == "__main__":
    main()
