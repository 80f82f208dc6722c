"""What CUDA kernels are launched for given shapes, and how well they fill the device: occupancy, waves, tail."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import LIBRARIES
from ._loader import native


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    The blocks of a launch run in waves: as many as the device holds at a time, then the next. The last wave takes about
    as long as a full one, however few blocks it has: the tail effect, which makes latency a staircase in the number of
    tokens ("Pruning One More Token is Enough", arXiv 2407.05941, section 2).

    Attributes:
        kernel: its name, with template arguments.
        grid: blocks in x, y and z.
        threads: threads of a block.
        registers: registers of a thread.
        static_shared: bytes of shared memory of a block that the kernel always has.
        dynamic_shared: bytes of shared memory of a block that this launch asks for on top.
        blocks_per_sm: blocks of this launch that a multiprocessor holds at a time.
        num_sms: multiprocessors of the device.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    static_shared: int
    dynamic_shared: int
    blocks_per_sm: int
    num_sms: int

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return math.prod(self.grid)

    @property
    def blocks_per_wave(self) -> int:
        """Blocks that the device holds at a time. Raises ValueError when it is not known, or none fits."""
        if self.blocks_per_sm < 1:
            raise ValueError(f"how many blocks of {self.kernel} a multiprocessor holds is not known, or none fits")
        return self.blocks_per_sm * self.num_sms

    @property
    def waves(self) -> float:
        """The grid in waves; the device takes about as long as for the next whole number."""
        return self.blocks / self.blocks_per_wave

    @property
    def tail(self) -> float:
        """How much of the last wave is filled: above 0, and 1 when no place is left free."""
        return ((self.blocks - 1) % self.blocks_per_wave + 1) / self.blocks_per_wave


@contextmanager
def record_launches(*, execute: bool = True, library: Path | None = None) -> Iterator[list[Launch]]:
    """Record the kernels of this package that are launched inside, by this thread; torch's own are not.

    The list is filled when the block ends, in the order of the launches, with what the current device says of each::

        with record_launches() as launches:
            ops.topk_gather(torch.empty(8, 197, 384, device="cuda"), torch.empty(8, 197, device="cuda"), 98)
        print([(launch.kernel, launch.waves, launch.tail) for launch in launches])

    What is launched never depends on values, so that empty tensors do. Of nested recordings, the innermost gets a
    launch. A CUDA graph launches when it is captured, not when it is replayed.

    Args:
        execute: False skips the kernels; results then hold whatever was in memory.
        library: where the kernels are; by default those that were built with this package. A build for the host (see
            csrc/simt) does not know ``registers``, ``static_shared`` and ``blocks_per_sm``: they are 0 there.

    Raises:
        RuntimeError: there are no CUDA kernels, or no CUDA device to launch them on.
    """
    module = native()
    if module is None:
        raise RuntimeError("launches cannot be recorded: tokenprune_ext._native is not built for this Python")
    recorder = module.LaunchRecorder(str(library or _cuda_kernels()), execute)
    launches: list[Launch] = []
    try:
        yield launches
    finally:
        for found in recorder.stop():
            launches.append(Launch(**{**found, "kernel": shorten(found["kernel"])}))


def _cuda_kernels() -> Path:
    kernels = LIBRARIES[1]
    if kernels.problem:
        raise RuntimeError(f"launches cannot be recorded: {kernels.name} is not available ({kernels.problem})")
    if not torch.cuda.is_available():
        raise RuntimeError("launches cannot be recorded: torch finds no CUDA device")
    return kernels.path


def shorten(name: str) -> str:
    """A demangled name without return type, our namespaces and parameter list."""
    name = re.sub(r"^void |tokenprune::|\(anonymous namespace\)::", "", name)
    depth = 0
    for place, letter in enumerate(name):
        if letter == "(" and depth == 0:
            return name[:place]
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return name
