"""Accuracy over many images, on any number of processes: the same figures, to the bit, on all of them.

Batches are dealt out whole, so that a batch holds the same images whatever the number of processes. Every image's
outcomes go to its place in one table, and figures are formed from the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from tokenprune_ext.data import DataError, ImageSource, Preprocessed
from tokenprune_ext.distributed import Processes
from tokenprune_ext.evaluate import OUTCOMES, Accuracy, EvaluationError, outcomes, summary


@dataclass(frozen=True)
class Evaluation:
    """What was found, for every process alike.

    Attributes:
        accuracy: by model.
        images_per_s: by model, of the forward alone, added over the processes. Where a process has several batches its
            first one is left out.
        corrupt: images that were skipped: their numbers and what was wrong.
    """

    accuracy: dict[str, Accuracy]
    images_per_s: dict[str, float]
    corrupt: dict[int, str]


def evaluate_sharded(
    models: Mapping[str, nn.Module],
    source: ImageSource,
    transform: Callable[[Any], Any],
    processes: Processes,
    *,
    batch_size: int = 32,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    skip_corrupt: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run every model on every image once; process r of K takes the batches r, r + K, r + 2 K and so on.

    Args:
        models: as for `evaluate.evaluate`; on this process's device.
        source, transform: the images and their preprocessing, the same in every process.
        processes: who takes part.
        batch_size: images of a batch, those that cannot be read included.
        workers: further processes, of this one, that read images.
        dtype: what images are cast to.
        skip_corrupt: leave out images that cannot be read; otherwise the first one ends the evaluation.
        on_batch: called with the number of images of each batch that is done.

    Raises:
        DataError: an image cannot be read, or none can.
        EvaluationError: see `evaluate.evaluate`.
    """
    timed = {name: _Timed(model) for name, model in models.items()}
    table = torch.zeros(len(source), 1 + OUTCOMES * len(models), dtype=torch.float64)  # first column: times counted
    corrupt: dict[int, str] = {}
    for batch in _batches(source, transform, batch_size, workers, processes):
        if batch.corrupt and not skip_corrupt:
            raise next(iter(batch.corrupt.values()))
        corrupt |= {number: str(error) for number, error in batch.corrupt.items()}
        if batch.numbers:
            images, labels = batch.images.to(processes.device, dtype), batch.labels.to(processes.device)
            found = outcomes(timed, images, labels, batch.numbers)
            table[batch.numbers] = torch.cat([torch.ones(len(images), 1, dtype=table.dtype), *found.values()], 1)
        if on_batch is not None:
            on_batch(len(batch.numbers) + len(batch.corrupt))
    table = processes.total(table)  # an image has zeros in every process but one: nothing is rounded
    corrupt = {number: error for part in processes.gather(corrupt) for number, error in sorted(part.items())}
    rates = processes.gather({name: model.images_per_s for name, model in timed.items()})
    read = table[:, 0] == 1
    if int(read.sum()) + len(corrupt) != len(source):
        raise EvaluationError(f"{int(read.sum())} images counted once and {len(corrupt)} skipped, of {len(source)}")
    if not read.any():
        raise DataError(
            f"none of the {len(source)} images can be read; {next(iter(corrupt.values()), 'there are none')}"
        )
    rows = dict(zip(models, table[read, 1:].split(OUTCOMES, 1), strict=True))
    reference = next(iter(rows.values()))
    return Evaluation(
        {name: summary(own, reference) for name, own in rows.items()},
        {name: sum(rate[name] for rate in rates) for name in models},
        dict(sorted(corrupt.items())),
    )


def own_images(count: int, batch_size: int, processes: Processes) -> int:
    """How many of `count` images are this process's."""
    return sum(map(len, _shard(count, batch_size, processes)))


def _shard(count: int, batch_size: int, processes: Processes) -> list[list[int]]:
    # torch's DistributedSampler would repeat images, or drop some, until all processes have as many.
    batches = list(BatchSampler(range(count), batch_size, drop_last=False))
    return batches[processes.rank :: processes.count]


@dataclass(frozen=True)
class _Batch:
    numbers: list[int]
    images: Tensor
    labels: Tensor
    corrupt: dict[int, DataError]


class _Numbered(Dataset[Any]):
    def __init__(self, images: Preprocessed) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.images[index]


def _collate(items: list[tuple[int, Any]]) -> _Batch:
    corrupt = {number: item for number, item in items if isinstance(item, DataError)}
    good = [(number, item) for number, item in items if number not in corrupt]
    images, labels = default_collate([item for _, item in good]) if good else (torch.empty(0), torch.empty(0))
    return _Batch([number for number, _ in good], images, labels, corrupt)


def _batches(
    source: ImageSource, transform: Callable[[Any], Any], batch_size: int, workers: int, processes: Processes
) -> Iterator[_Batch]:
    images = _Numbered(Preprocessed(source, transform))
    shard = _shard(len(source), batch_size, processes)
    yield from DataLoader(images, batch_sampler=shard, num_workers=workers, collate_fn=_collate)


class _Timed(nn.Module):
    """A model whose forwards are timed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs: list[tuple[int, float]] = []

    def forward(self, images: Tensor) -> Any:
        start = _now(images.device)
        scores = self.model(images)
        self.runs.append((len(images), _now(images.device) - start))
        return scores

    @property
    def images_per_s(self) -> float:
        runs = self.runs[1:] or self.runs
        return sum(images for images, _ in runs) / sum(seconds for _, seconds in runs) if runs else 0.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
