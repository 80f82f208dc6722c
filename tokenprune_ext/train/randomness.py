"""The generators of a process: Python's, NumPy's and torch's, all of which timm and models draw from."""
# ruff: noqa: NPY002 - timm uses NumPy's global generator

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

ORDER, IMAGE, MIX, PROCESS, DRAWS = range(5)  # streams of random numbers of a run


def seed(*key: int) -> None:
    """Start this process's CPU generators from whole numbers."""
    first, second, third = (int(part) for part in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)  # not torch.manual_seed: workers must not touch the GPUs


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """The CPU generators start from `key`; afterwards they go on where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def states(device: torch.device) -> dict[str, Any]:
    """Of all generators of this process, as plain values and tensors."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(stored: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator where it was."""
    random.setstate(stored["python"])
    kind, keys, *rest = stored["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(stored["torch"])
    if stored["device"] is not None:
        torch.cuda.set_rng_state(stored["device"], device)


class Draws:
    """Random numbers for the images of a batch: the same on any number of processes, and in a run that was resumed.

    Args:
        key: of the step.
        places: of the images among all of the step.
        count: images of the step, over all processes.
    """

    def __init__(self, key: tuple[int, ...], places: torch.Tensor, count: int) -> None:
        stream = np.random.SeedSequence((*key[:1], DRAWS, *key[1:])).generate_state(1)[0]
        self.places, self.count = places, count
        self.generator = torch.Generator().manual_seed(int(stream))

    def exponential(self, out: torch.Tensor) -> torch.Tensor:
        """Fill a tensor ``[images, ...]`` with exponential noise, and return it."""
        everyone = torch.empty((self.count, *out.shape[1:]), dtype=out.dtype)
        return out.copy_(everyone.exponential_(generator=self.generator)[self.places])
