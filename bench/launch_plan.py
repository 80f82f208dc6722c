"""What every operator launches, and how it fills an A100, an Orin and an H100 or H200: on paper, without a GPU.

Grids and shared memory are what the launchers ask for: they run in the host build of the CUDA kernels (csrc/simt), with
the kernels left out. Registers and static shared memory are of kernel_resources.json, blocks per multiprocessor of
occupancy.py. A floor is of the benchmark's bytes and operations at the rates of a data sheet. Shapes are those of the
benchmarks, in bfloat16; head_aggregate gets scores in float32.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from floors import DATA_SHEETS
from harness import Case
from kernel_resources import Kernel, read
from occupancy import ARCHITECTURES, blocks_per_sm
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tokenprune_ext.launches import Launch, record_launches
from tokenprune_ext.ops import __all__ as operators

BENCH = Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent / "python_tests"))
from ops import simt  # noqa: E402

OUTPUT = BENCH / "results" / "paper"
SOURCE = "on paper, from data sheets, not measured"
ITERATIONS = 5  # of wpr and wpr_qk; the other counts of the benchmarks only repeat launches

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name from 3.13 on


class OnHost(TorchDispatchMode):
    """Operators on meta tensors also go to their launchers in the host build."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tokenprune":
            simt.call(func.overloadpacket.__name__, *tree_map_only(Tensor, _addresses, args))
        return func(*args, **(kwargs or {}))


@functools.cache
def _space() -> mmap.mmap:
    """Addresses for more than a GPU holds. No memory stands behind them, because nothing is read or written."""
    return mmap.mmap(-1, 2**38, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)


def _addresses(tensor: Tensor) -> Tensor:
    return torch.frombuffer(_space(), dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


@functools.cache
def resources() -> dict[tuple[str, str], Kernel]:
    return {(kernel.kernel, kernel.arch): kernel for kernel in read(BENCH / "results/kernel_resources.json").kernels}


def launches(case: Case, arch: str) -> list[Launch]:
    """What the operator launches for this case, with what ptxas and the occupancy calculator say of it."""
    simt.configure(arch)
    with record_launches(execute=False, library=simt.path()) as recorded, OnHost():
        case.variants["kernel"]()
    return [_on_paper(launch, arch) for launch in recorded]


def _on_paper(launch: Launch, arch: str) -> Launch:
    kernel = resources()[launch.kernel, arch]
    shared = kernel.shared + launch.dynamic_shared
    held = blocks_per_sm(ARCHITECTURES[arch], launch.threads, kernel.registers, shared)
    return replace(launch, registers=kernel.registers, static_shared=kernel.shared, blocks_per_sm=held)


def records(case: Case) -> Iterator[dict[str, Any]]:
    """A record a launch; equal ones are counted, in ``times``. Shared memory in bytes, floors in seconds."""
    for arch in ARCHITECTURES:
        floors = _floors(case, arch)
        if not floors:
            continue
        for launch, times in Counter(launches(case, arch)).items():
            yield {
                "op": case.op,
                **case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "arch": arch,
                "kernel": launch.kernel,
                "times": times,
                "grid": launch.grid,
                "threads": launch.threads,
                "registers": launch.registers,
                "static_shared": launch.static_shared,
                "dynamic_shared": launch.dynamic_shared,
                "blocks_per_sm": launch.blocks_per_sm,
                "waves": round(launch.waves, 4),
                "tail": round(launch.tail, 4),
                "floor_s": floors,
                "source": SOURCE,
            }


def _floors(case: Case, arch: str) -> dict[str, float]:
    """Of the devices whose memory holds the inputs and outputs."""
    return {
        device: float(f"{sheet.rates.floor_s(case.bytes_moved, case.flops):.4g}")
        for device, sheet in DATA_SHEETS.items()
        if sheet.arch == arch and sheet.memory_bytes >= case.bytes_moved
    }


def cases(op: str) -> Iterator[Case]:
    torch.manual_seed(0)
    for case in importlib.import_module(f"bench_{op}").cases("meta"):
        dtype = torch.float32 if op == "head_aggregate" else torch.bfloat16
        if case.dtype == dtype and case.shape.get("iters", ITERATIONS) == ITERATIONS:
            yield case


def table(op: str, found: list[dict[str, Any]]) -> Table:
    columns = ("grid", "threads", "registers", "shared bytes", "blocks/SM", "waves", "tail", "floor µs")
    shown = Table("case", "arch", "kernel", *columns, title=f"{op}: {SOURCE}")
    for record in found:
        sizes = list(record)[1 : list(record).index("dtype")]
        times = f" ({record['times']} x)" if record["times"] > 1 else ""
        shown.add_row(
            " ".join(f"{size}={record[size]}" for size in sizes),
            record["arch"],
            record["kernel"] + times,
            " x ".join(str(blocks) for blocks in record["grid"]),
            str(record["threads"]),
            str(record["registers"]),
            f"{record['static_shared']} + {record['dynamic_shared']}",
            str(record["blocks_per_sm"]),
            f"{record['waves']:.2f}",
            f"{record['tail']:.0%}",
            ", ".join(f"{seconds * 1e6:.3g}" for seconds in record["floor_s"].values()),
        )
    return shown


@click.command(help=__doc__)
@click.option("--op", "chosen", type=click.Choice(operators), multiple=True, help="Only these; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Folder; gets a file an operator.")
def main(chosen: tuple[str, ...], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for op in chosen or operators:
        found = [record for case in cases(op) for record in records(case)]
        Console(width=None if sys.stdout.isatty() else 200).print(table(op, found))
        (output / f"{op}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


if __name__ == "__main__":
    main()
