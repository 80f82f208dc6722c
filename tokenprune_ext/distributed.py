"""One process of several that torchrun started, or the only one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# How long a process waits for the slowest one. torchrun ends all of them when one fails.
_TIMEOUT = timedelta(days=1)


class ProcessError(RuntimeError):
    """What went wrong in another process."""


@dataclass(frozen=True)
class Processes:
    """All processes, seen from one.

    Attributes:
        rank: number of this process.
        count: number of processes.
        device: this process's device.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, for each of them."""
        if self.count == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def gather(self, value: T) -> list[T]:
        """Every process's value, for each of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def together(self, step: Callable[[], T]) -> T:
        """Take a step that all have to take: when one fails, all stop, and only the first one says why.

        Raises:
            ProcessError: it failed in another process. The other processes exit with status 1.
        """
        try:
            result, error = step(), None
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else str(error) or type(error).__name__)
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return result
        if not self.leads:
            raise SystemExit(1)
        if error is not None:
            raise error
        raise ProcessError(f"process {failed[0]} of {self.count}: {messages[failed[0]]}")


@contextmanager
def processes(device: torch.device | str) -> Iterator[Processes]:
    """The processes that torchrun started; without it this one. On CUDA each has the GPU of its local rank.

    Raises:
        ValueError: a GPU was chosen for several processes, or there are fewer GPUs than processes on a machine.
    """
    device = torch.device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"{count} processes cannot share {device}: give cuda, and each takes a GPU of its own")
        if local >= there:
            raise ValueError(f"more processes on this machine than its {there} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield Processes(dist.get_rank(), count, device)
    dist.destroy_process_group()  # not after an error: the others may be waiting
