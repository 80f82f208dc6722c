"""A training run that takes a second: small images of one colour a class, a small transformer, and runs of it."""

from __future__ import annotations

import csv
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer

from tokenprune_ext.distributed import processes
from tokenprune_ext.dynamicvit.objective import DynamicViTObjective
from tokenprune_ext.train import CrossEntropy, Objective, Options, Trained, TrainingData, train
from tokenprune_ext.vtp.objective import SparsityObjective

CLASSES, SIDE = 3, 16


class Colours:
    """Image i has class i mod 3, which is its strongest channel."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 160, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[..., index % CLASSES] += 60
        return Image.fromarray(pixels), index % CLASSES


def colours(count: int = 22, held_out: int = 6) -> TrainingData:
    augmented = create_transform(SIDE, is_training=True, color_jitter=0.2, re_prob=0.3)
    plain = create_transform(SIDE, is_training=False, crop_pct=1.0)
    return TrainingData(Colours(count), augmented, CLASSES, (Colours(held_out), plain) if held_out else None)


def small_vit(drop: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    shape = dict(img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES)
    return VisionTransformer(**shape, drop_path_rate=drop, proj_drop_rate=drop)


def options(**changed: Any) -> Options:
    """Steps of 7, 7, 7 and 1 images."""
    given: dict[str, Any] = dict(epochs=2, batch_size=7, lr=1e-3, warmup_epochs=0.5, warmup_lr=1e-5, log_every=3)
    return Options(**{**given, **changed})


def objective_of(method: str, smoothing: float) -> Objective:
    if method == "vtp":
        return SparsityObjective(1e-2, 10.0, smoothing)
    if method == "dynamicvit":
        return DynamicViTObjective(small_vit(), 0.5, before=[1], label_smoothing=smoothing, backbone_lr_scale=0.5)
    return CrossEntropy(smoothing)


def toy(
    output: Path,
    drop: float = 0.0,
    smoothing: float = 0.1,
    held_out: int = 6,
    method: str = "finetune",
    **changed: Any,
) -> Trained:
    """A run of this process or, under torchrun's variables, of several."""
    torch.set_num_threads(1)
    with processes("cpu") as group:
        data, how = colours(held_out=held_out), options(**changed)
        return train(small_vit(drop), objective_of(method, smoothing), data, how, output, processes=group)


def forked(target: Callable[..., Any], *args: Any, count: int = 1, **kwargs: Any) -> list[int]:
    """Run it in `count` processes that know of each other as under torchrun; their exit codes, -9 for a killed one.

    They are forks of a server, not of this process, where autograd may have started threads. The target has to be a
    function of a module, not of a test file. The server has not this process's sys.path, and its forks do: what is
    loaded ahead of them, for speed, must not be this package.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch.distributed", "timm.data", "timm.models", "timm.optim", "timm.scheduler"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [server.Process(target=_run, args=(rank, variables, target, args, kwargs)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if any(other.exitcode not in (0, None) for other in started):  # torchrun ends the others
            for other in started:
                other.kill()
                other.join()
    return [process.exitcode for process in started]


def _run(rank: int, variables: Mapping[str, str], target: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    target(*args, **kwargs)


def rows(folder: Path) -> list[dict[str, str]]:
    """Of metrics.csv, without what was timed."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert all(float(row.pop("images_per_s")) > 0 for row in found)
    return found


def stored(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)
