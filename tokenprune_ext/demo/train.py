"""Trains the demo model from scratch on the CPU: ``python -m tokenprune_ext.demo.train --out FILE``.

A small transformer learns slowly from a class label alone, so training also

* asks every patch token, after half of the blocks and after the last, whether it shows background or which class,
* starts from attention weights that look at nearby tokens (mimetic initialisation, Trockman and Kolter 2023),
* gives most steps only a square window of tokens around the object, and the last steps all of them.

The heads of the patch tokens are dropped before saving: the file holds the plain timm model. Other versions of
the libraries or another number of threads give slightly different weights. Needs ``torch.optim.Muon``.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .images import CLASSES, GENERATOR_VERSION, GRID, IMAGE_SIZE, DemoImages
from .model import DenselyTaught, create_model, initialise

__all__ = ["Options", "evaluate", "main", "train"]

_CHUNK: Final = 500
_QUICK_IMAGES: Final = 500
_BACKGROUND_WEIGHT: Final = 0.3


class Images(NamedTuple):
    """Images in memory: uint8 ``[N, 3, H, W]``, class numbers ``[N]``, object patches bool ``[N, GRID, GRID]``."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor


class Options(NamedTuple):
    """Settings of a training run; the defaults made the packaged weights.

    ``window`` is the side of the token window in patches, ``full_steps`` the number of steps with all tokens;
    ``decay_steps`` is how many of the window steps lower the learning rate to ``full_learning_rate``.
    """

    images: int = 12000
    window_steps: int = 5200
    decay_steps: int = 3200
    full_steps: int = 1000
    batch: int = 32
    window: int = 7
    learning_rate: float = 3e-3
    full_learning_rate: float = 6e-4
    weight_decay: float = 0.05
    seed: int = 0
    validation: int = 2000
    workers: int = 2
    threads: int = 1


def _check(options: Options) -> None:
    for name, value in options._asdict().items():
        low = 0 if name in ("seed", "weight_decay", "window_steps", "full_steps") else 1 if type(value) is int else 1e-9
        if value < low:
            raise ValueError(f"{name} is {value}; it must be {'positive' if low else '0 or more'}")
    if options.window > GRID:
        raise ValueError(f"window is {options.window}; it must be at most {GRID}")


def _generate_chunk(split: str, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = DemoImages(stop, seed, split)
    pixels = np.empty((stop - start, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    labels = np.empty(stop - start, np.int64)
    masks = np.empty((stop - start, GRID, GRID), np.bool_)
    for row in range(stop - start):
        image, label, mask = data.with_mask(start + row)
        pixels[row] = np.asarray(image).transpose(2, 0, 1)
        labels[row], masks[row] = label, mask.numpy()
    return pixels, labels, masks


def generate(count: int, seed: int, split: str, workers: int) -> Images:
    """Draws ``count`` images with ``workers`` processes."""
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(_generate_chunk, split, seed, at, min(at + _CHUNK, count)) for at in starts]
        parts = [job.result() for job in jobs]
    pixels, labels, masks = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return Images(pixels, labels, masks)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1], the preprocessing of the model."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def augment(batch: Images, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrors, quarter turns and colour changes; float images ``[B, 3, H, W]`` and masks ``[B, GRID, GRID]``."""
    pixels, masks = normalise(batch.pixels), batch.masks.clone()
    count = len(pixels)
    poses = torch.randint(8, (count,), generator=rng)
    for pose in range(1, 8):
        rows = (poses == pose).nonzero()[:, 0]
        turns, mirrored = pose % 4, pose >= 4
        for tensor in (pixels, masks):
            turned = torch.rot90(tensor[rows], turns, (-2, -1))
            tensor[rows] = turned.flip(-1) if mirrored else turned
    channels = torch.rand(count, 3, generator=rng).argsort(dim=1)
    pixels = pixels.gather(1, channels[:, :, None, None].expand_as(pixels))
    # A negative gain gives the negative of the image: the shape stays what it is.
    gain = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.1, generator=rng)
    gain *= torch.randint(2, (count, 1, 1, 1), generator=rng) * 2 - 1
    return pixels * gain, masks


def window_tokens(masks: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """Patch numbers ``[B, side * side]`` of a random window that holds the object of each image."""
    count = len(masks)
    corners = []
    for dim in (2, 1):
        covered = masks.any(dim=dim).to(torch.int64)
        first, last = covered.argmax(1), GRID - 1 - covered.flip(1).argmax(1)
        low, high = (last - side + 1).clamp(min=0), first.clamp(max=GRID - side)
        corners.append(low + (torch.rand(count, generator=rng) * (high - low + 1).clamp(min=1)).long())
    offsets = torch.arange(side)
    rows, columns = (corner.clamp(0, GRID - side)[:, None] + offsets for corner in corners)
    return (rows[:, :, None] * GRID + columns[:, None, :]).flatten(1)


def _loss(outputs: tuple[Tensor, list[Tensor]], labels: Tensor, targets: Tensor) -> Tensor:
    logits, extra = outputs
    weight = torch.ones(len(CLASSES) + 1)
    weight[-1] = _BACKGROUND_WEIGHT
    loss = F.cross_entropy(logits, labels)
    for patch_logits in extra:
        loss = loss + F.cross_entropy(patch_logits.flatten(0, 1), targets.flatten(), weight)
    return loss


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images, batch: int = 100) -> float:
    """Top-1 accuracy in [0, 1] of ``model`` as it stands, in steps of ``batch`` images."""
    hits = 0
    for pixels, labels in zip(torch.split(images.pixels, batch), torch.split(images.labels, batch), strict=True):
        hits += int((model(normalise(pixels)).argmax(1) == labels).sum())
    return hits / len(images.labels)


def _rate(step: int, options: Options) -> float:
    """Learning rate of a step: warm-up, constant, linear over the last window steps, linear to 0 over whole images."""
    left = options.window_steps - step
    if left > 0:
        high, low = options.learning_rate, options.full_learning_rate
        return (low + (high - low) * min(1.0, left / options.decay_steps)) * min(1.0, (step + 1) / 100)
    return options.full_learning_rate * (1 + left / options.full_steps)


def _optimizers(learner: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learn in fewer steps with it than with AdamW; AdamW for the rest."""
    matrices = [value for name, value in learner.named_parameters() if value.ndim == 2 and ".blocks." in name]
    kept = {id(value) for value in matrices}
    others = [value for value in learner.parameters() if id(value) not in kept]
    decay = options.weight_decay
    muon = torch.optim.Muon(matrices, options.learning_rate, decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, options.learning_rate, betas=(0.9, 0.98), weight_decay=decay)
    return [muon, adam]


class _Run:
    """The state of a training run."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.options = options
        self.rng = torch.Generator().manual_seed(options.seed)
        self.data = generate(options.images, options.seed, "train", options.workers)
        self.held_out = generate(options.validation, options.seed, "val", options.workers)
        self.learner = DenselyTaught(create_model())
        initialise(self.learner.model, self.rng)
        self.optimizers = _optimizers(self.learner, options)

    def step(self, number: int) -> tuple[float, float]:
        """One update of the weights; the loss and the accuracy on its batch."""
        options = self.options
        chosen = torch.randint(options.images, (options.batch,), generator=self.rng)
        images, masks = augment(Images(*(column[chosen] for column in self.data)), self.rng)
        labels = self.data.labels[chosen]
        targets = torch.where(masks.flatten(1), labels[:, None], len(CLASSES))
        tokens = window_tokens(masks, options.window, self.rng) if number < options.window_steps else None
        if tokens is not None:
            targets = targets.gather(1, tokens)
        outputs = self.learner(images, tokens)
        loss = _loss(outputs, labels, targets)
        self._update(loss, _rate(number, options))
        return loss.item(), float((outputs[0].argmax(1) == labels).float().mean())

    def _update(self, loss: Tensor, rate: float) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def save(self, out: Path, images: int, **facts: object) -> float:
        """Writes the weights; returns their accuracy on the first ``images`` validation images."""
        accuracy = evaluate(self.learner.model, Images(*(column[:images] for column in self.held_out)))
        facts = {**self.options._asdict(), **facts, "generator_version": GENERATOR_VERSION, "accuracy_images": images}
        facts["accuracy"] = f"{accuracy:.4f}"
        state = {name: value.to(torch.float16) for name, value in self.learner.model.state_dict().items()}
        part = out.with_suffix(".part")  # so that the file is never half written
        save_file(state, part, {name: str(value) for name, value in facts.items()})
        part.replace(out)
        return accuracy


def train(options: Options, out: Path, report_every: int = 250) -> float:
    """Trains, writes the weights to ``out`` now and then and at the end; returns the validation accuracy.

    The accuracy reported during the window steps is low: the model has not met whole images by then. Sets the
    number of PyTorch threads and the global seed. Raises ValueError for an option outside its range.
    """
    _check(options)
    begin = time.monotonic()
    run = _Run(options)
    print(f"{options.images} images drawn in {time.monotonic() - begin:.0f} s", flush=True)
    steps = options.window_steps + options.full_steps
    seen = []
    for number in range(steps):
        seen.append(run.step(number))
        if (number + 1) % report_every == 0:
            accuracy = run.save(out, min(_QUICK_IMAGES, options.validation), steps=number + 1)
            loss, fitted = np.mean(seen, axis=0)
            print(
                f"step {number + 1} loss {loss:.3f} training accuracy {fitted:.3f} "
                f"validation accuracy {accuracy:.3f} after {time.monotonic() - begin:.0f} s",
                flush=True,
            )
            seen.clear()
    accuracy = run.save(out, options.validation, steps=steps)
    print(f"accuracy {accuracy:.4f} on {options.validation} images after {time.monotonic() - begin:.0f} s", flush=True)
    return accuracy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the demo model and writes its float16 weights.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    for name, value in Options()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    try:
        train(Options(**arguments), out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
