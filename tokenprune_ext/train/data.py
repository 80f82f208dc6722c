"""Images of a run: order and augmentation depend on the seed alone, not on processes or interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tokenprune_ext.data import DataError, ImageSource
from tokenprune_ext.distributed import Processes

from .options import Options
from .randomness import IMAGE, MIX, ORDER, seeded

Key = tuple[int, int]  # epoch and number of an image
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class TrainingData:
    """What is trained on and, where there is something, what the accuracy is measured on.

    Attributes:
        images, transform: labelled images and their random augmentation to float [3, H, W].
        classes: number of classes of the model.
        held_out: labelled images to measure the accuracy on, and their preprocessing; None for neither.
    """

    images: ImageSource
    transform: Transform
    classes: int
    held_out: tuple[ImageSource, Transform] | None = None


def share(count: int, rank: int, processes: int) -> list[int]:
    """Places of a batch that are one process's; none in both ends or the middle is another's.

    They come in pairs from the two ends, so that mixing a share with itself backwards mixes the same images as mixing
    the whole batch with itself backwards.
    """
    half = count // 2
    front = list(range(rank, half, processes))
    middle = [half] if count % 2 and half % processes == rank else []
    return [*front, *middle, *(count - 1 - place for place in reversed(front))]


class Plan(Sampler[list[Key]]):
    """Which images every step trains on; iterating gives this process's, from step `start` on."""

    def __init__(self, images: int, options: Options, processes: Processes, start: int = 0) -> None:
        self.images, self.options, self.processes, self.start = images, options, processes, start
        self.steps_per_epoch = -(-images // options.batch_size)
        self.steps = self.steps_per_epoch * options.epochs
        self._order = lru_cache(maxsize=1)(self._draw)

    def _draw(self, epoch: int) -> list[int]:
        with seeded(self.options.seed, ORDER, epoch):
            return torch.randperm(self.images).tolist()

    def size(self, step: int) -> int:
        """Images of a step, over all processes."""
        first = step % self.steps_per_epoch * self.options.batch_size
        return min(self.options.batch_size, self.images - first)

    def own(self, step: int) -> int:
        """Images of a step that are this process's."""
        return len(share(self.size(step), self.processes.rank, self.processes.count))

    def keys(self, step: int) -> list[Key]:
        """This process's images of a step; where it has none, one that does not count."""
        epoch, number = divmod(step, self.steps_per_epoch)
        first = number * self.options.batch_size
        return [(epoch, self._order(epoch)[first + place]) for place in self.places(step)]

    def places(self, step: int) -> list[int]:
        """Of those images among all of the step."""
        return share(self.size(step), self.processes.rank, self.processes.count) or [0]

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, range(self.start, self.steps))


class _Augmented(Dataset[Any]):
    """(tensor, label) of a key, or the DataError itself: a worker process would wrap a raised one."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | DataError:
        try:
            image, label = self.source[key[1]]
        except DataError as error:
            return error
        with seeded(self.seed, IMAGE, *key):
            return self.transform(image), label


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


def batches(data: TrainingData, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, 3, H, W] and labels [B] of this process, step by step.

    Raises:
        DataError: an image that cannot be read, by its path.
    """
    options = plan.options
    loader: DataLoader[Any] = DataLoader(
        _Augmented(data.images, data.transform, options.seed),
        batch_sampler=plan,
        num_workers=options.workers,
        collate_fn=_collate,
        pin_memory=plan.processes.device.type == "cuda",
        generator=torch.Generator(),  # else the loader takes a number of the global one
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch[0], batch[1]


def mixer(options: Options, classes: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None:
    """Mixes images and labels of a step by mixup and cutmix; None where neither is asked for."""
    if not options.mixup and not options.cutmix:
        return None
    mix = Mixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=classes)  # smoothing is the loss's

    def mixed(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        count, odd = len(labels), len(labels) % 2
        if odd:  # timm wants an even number: the image in the middle is mixed with itself
            rows = torch.arange(count + 1, device=images.device)
            rows[count // 2 + 1 :] -= 1
            images, labels = images[rows], labels[rows]
        with seeded(options.seed, MIX, step):  # the same amount and the same box in every process
            images, targets = mix(images.clone(), labels)
        if not odd:
            return images, targets
        kept = rows.diff(prepend=rows[:1] - 1) > 0
        return images[kept], targets[kept]

    return mixed
