"""Accuracy of pruned models, image by image against the dense model they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class EvaluationError(RuntimeError):
    """A model whose output cannot be evaluated: no class scores, or scores that are not finite."""


@dataclass(frozen=True)
class Accuracy:
    """What one model does on a set of images; `None` where it needs labels and there are none.

    Attributes:
        images: number of images.
        top1: share of images whose highest score is the label's, in 0..1.
        top1_change: top1 minus the reference's.
        top1_change_se: paired standard error of that change.
        agreement: share of images with the same highest score as the reference.
        kl: mean KL(reference || model) of the class distributions, in nats.
        kl_se: its standard error.
    """

    images: int
    top1: float | None
    top1_change: float | None
    top1_change_se: float | None
    agreement: float
    kl: float
    kl_se: float | None


@dataclass
class _Tally:
    """Per-image outcomes of one model, gathered batch by batch."""

    hit: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)


def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Accuracy]:
    """Run every model on every batch: one pass over the images, bounded memory, paired outcomes.

    Args:
        models: classifiers by name, images [B, 3, H, W] -> scores [B, classes]; the first is the reference.
        batches: (float images [B, 3, H, W], labels [B]); labels below 0 mean unlabelled, for all images or none.
        device, dtype: where the images are moved and what they are cast to; the models must be there already.
        on_batch: called with the number of images done after each batch.

    Returns:
        One `Accuracy` per model, in the order of `models`.

    Raises:
        EvaluationError: no images, an output that is no [B, classes] tensor, or a score that is not finite.
    """
    tallies = {name: _Tally() for name in models}
    seen = 0
    for images, labels in batches:
        images = images.to(device, dtype)
        labels = labels.to(device)
        reference: Tensor | None = None
        for name, model in models.items():
            log_p = log_probabilities(model, images, name, seen)
            if reference is None:
                reference = log_p
            _record(tallies[name], log_p, reference, labels)
        seen += len(images)
        if on_batch is not None:
            on_batch(len(images))
    if not seen:
        raise EvaluationError("no images to evaluate on")
    base = torch.cat(next(iter(tallies.values())).hit)
    return {name: _summary(tally, base) for name, tally in tallies.items()}


def log_probabilities(model: nn.Module, images: Tensor, name: str, first: int) -> Tensor:
    """Log of the class distribution [B, classes] of one batch, float32 or better.

    Args:
        model, images: the classifier and its input [B, 3, H, W].
        name: what messages call the model.
        first: number of the batch's first image, for messages.

    Raises:
        EvaluationError: an output that is no [B, classes] tensor, or a score that is not finite.
    """
    with torch.inference_mode():
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"{name}: expected scores of shape [{len(images)}, classes], got {shape}")
    bad = (~logits.isfinite()).any(dim=1)
    if bad.any():
        raise EvaluationError(
            f"{name}: scores that are not finite for {int(bad.sum())} of {len(images)} images in {logits.dtype}, "
            f"the first is image {first + int(bad.nonzero()[0])} (counted from 0)"
        )
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(dim=1)


def divergence(reference: Tensor, log_p: Tensor) -> Tensor:
    """KL(reference || model) of every image [B], in nats, float64, from log probabilities [B, classes]."""
    kl = (reference.exp() * (reference - log_p)).sum(dim=1)
    return kl.clamp_min(0).double()  # rounding can leave a hair below 0


def _record(tally: _Tally, log_p: Tensor, reference: Tensor, labels: Tensor) -> None:
    best = log_p.argmax(dim=1)
    hit = torch.where(labels >= 0, (best == labels).double(), torch.nan)
    tally.hit.append(hit.cpu())
    tally.agrees.append((best == reference.argmax(dim=1)).double().cpu())
    tally.kl.append(divergence(reference, log_p).cpu())


def _summary(tally: _Tally, base: Tensor) -> Accuracy:
    hit, agrees, kl = torch.cat(tally.hit), torch.cat(tally.agrees), torch.cat(tally.kl)
    labelled = not hit.isnan().any()
    return Accuracy(
        images=len(hit),
        top1=float(hit.mean()) if labelled else None,
        top1_change=float((hit - base).mean()) if labelled else None,
        top1_change_se=_standard_error(hit - base) if labelled else None,
        agreement=float(agrees.mean()),
        kl=float(kl.mean()),
        kl_se=_standard_error(kl),
    )


def _standard_error(values: Tensor) -> float | None:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
