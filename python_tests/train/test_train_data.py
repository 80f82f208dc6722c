"""Images of a run: shares of processes, order, augmentation and mixing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from toy_training import CLASSES, colours, options

from tokenprune_ext.distributed import Processes
from tokenprune_ext.train.data import Plan, batches, mixer, share
from tokenprune_ext.train.randomness import MIX, restore, seeded, states

CPU = torch.device("cpu")


def plan(rank: int = 0, count: int = 1, start: int = 0, **changed: object) -> Plan:
    return Plan(22, options(**changed), Processes(rank, count, CPU), start)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", range(1, 12))
def test_shares(count: int, processes: int) -> None:
    parts = [share(count, rank, processes) for rank in range(processes)]
    assert sorted(place for part in parts for place in part) == list(range(count))
    for part in parts:
        assert [count - 1 - place for place in part[::-1]] == part  # backwards, it pairs as the whole batch does
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_image_once_an_epoch(processes: int) -> None:
    plans = [plan(rank, processes) for rank in range(processes)]
    assert plans[0].steps == 8
    for epoch in range(2):
        steps = range(4 * epoch, 4 * epoch + 4)
        seen = [key for one in plans for step in steps if one.own(step) for key in one.keys(step)]
        assert sorted(seen) == [(epoch, image) for image in range(22)]
    assert [plans[0].size(step) for step in range(4)] == [7, 7, 7, 1]


def test_order_depends_on_epoch_and_seed_alone() -> None:
    order = [key[1] for step in plan() for key in step]
    assert order[:22] != order[22:] != list(range(22))
    assert [key[1] for step in plan(accumulate=2) for key in step] == order
    assert [key[1] for step in plan(seed=1) for key in step] != order
    assert list(plan(start=5)) == list(plan())[5:]


def test_images_depend_on_their_number_and_epoch_alone() -> None:
    data = colours()
    torch.manual_seed(1)
    found = list(batches(data, plan()))
    torch.manual_seed(2)
    later = list(batches(data, plan(start=5)))
    read = list(batches(data, plan(start=5, workers=2)))
    for (images, labels), (others, more), (processed, _) in zip(found[5:], later, read, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(images, processed)
        assert torch.equal(labels, more)
    first, second = (torch.cat([images for images, _ in part]) for part in (found[:4], found[4:]))
    assert not torch.equal(first.sum(0), second.sum(0))  # another augmentation in another epoch


def test_reading_leaves_the_generators_alone() -> None:
    before = states(CPU)
    list(batches(colours(), plan()))
    assert str(states(CPU)) == str(before)


def test_generators_go_on() -> None:
    before = states(CPU)
    with seeded(1, 2):
        inside = torch.rand(1), np.random.default_rng, random.random()
    with seeded(1, 2):
        assert torch.equal(torch.rand(1), inside[0])
        assert random.random() == inside[2]
    values = torch.rand(3), random.random()
    restore(before, CPU)
    assert torch.equal(torch.rand(3), values[0])
    assert random.random() == values[1]


@pytest.mark.parametrize("kind", [dict(mixup=0.4), dict(cutmix=1.0), dict(mixup=0.4, cutmix=1.0)])
@pytest.mark.parametrize("count", [6, 7, 1])
def test_mixing_shares_is_mixing_the_batch(kind: dict[str, float], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % CLASSES
    mixed = mixer(options(**kind), CLASSES)
    for step in range(5):
        whole = mixed(images, labels, step)
        assert whole[0].shape == images.shape
        assert whole[1].sum(1).allclose(torch.ones(count))
        for processes in (2, 3):
            for rank in range(processes):
                places = share(count, rank, processes)
                if places:
                    ours = mixed(images[places], labels[places], step)
                    assert torch.equal(ours[0], whole[0][places])
                    assert torch.equal(ours[1], whole[1][places])


def test_mixing_is_timms() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % CLASSES
    ours = mixer(options(mixup=0.4, cutmix=1.0), CLASSES)(images, labels, 3)
    with seeded(0, MIX, 3):
        theirs = Mixup(0.4, 1.0, label_smoothing=0.0, num_classes=CLASSES)(images.clone(), labels)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert mixer(options(), CLASSES) is None
