"""Accuracy of pruned models, image by image against the dense model they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OUTCOMES = 4  # figures of an image
_FIRST = 5


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
        top5: share of images whose label is among the five highest scores; None as well with no more than five classes.
    """

    images: int
    top1: float | None
    top1_change: float | None
    top1_change_se: float | None
    agreement: float
    kl: float
    kl_se: float | None
    top5: float | None = None


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
    tallies: dict[str, list[Tensor]] = {name: [] for name in models}
    seen = 0
    for images, labels in batches:
        numbers = range(seen, seen + len(images))
        for name, rows in outcomes(models, images.to(device, dtype), labels.to(device), numbers).items():
            tallies[name].append(rows)
        seen += len(images)
        if on_batch is not None:
            on_batch(len(images))
    if not seen:
        raise EvaluationError("no images to evaluate on")
    tables = {name: torch.cat(rows) for name, rows in tallies.items()}
    reference = next(iter(tables.values()))
    return {name: summary(table, reference) for name, table in tables.items()}


def outcomes(
    models: Mapping[str, nn.Module], images: Tensor, labels: Tensor, numbers: Sequence[int]
) -> dict[str, Tensor]:
    """What every model does on each image of a batch: rows for `summary`, float64 [B, OUTCOMES] on the CPU.

    Args:
        models: as for `evaluate`; the first is the reference.
        images, labels: [B, 3, H, W] and [B], where the models are.
        numbers: what an error calls the images.
    """
    found: dict[str, Tensor] = {}
    reference: Tensor | None = None
    for name, model in models.items():
        log_p = log_probabilities(model, images, name, numbers)
        reference = log_p if reference is None else reference
        found[name] = _outcome(log_p, reference, labels)
    return found


def summary(rows: Tensor, reference: Tensor) -> Accuracy:
    """The figures of all images from their `outcomes`, and from those of the reference."""
    hit, hit5, agrees, kl = rows.unbind(1)
    change = hit - reference[:, 0]
    labelled = not hit.isnan().any()
    return Accuracy(
        images=len(rows),
        top1=_mean(hit) if labelled else None,
        top1_change=_mean(change) if labelled else None,
        top1_change_se=_standard_error(change) if labelled else None,
        agreement=_mean(agrees),
        kl=_mean(kl),
        kl_se=_standard_error(kl),
        top5=None if hit5.isnan().any() else _mean(hit5),
    )


def log_probabilities(model: nn.Module, images: Tensor, name: str, numbers: Sequence[int]) -> Tensor:
    """Log of the class distribution [B, classes] of one batch, float32 or better.

    Args:
        model, images: the classifier and its input [B, 3, H, W].
        name, numbers: what an error calls the model and the images.

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
            f"the first is image {numbers[int(bad.nonzero()[0])]} (counted from 0)"
        )
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(dim=1)


def divergence(reference: Tensor, log_p: Tensor) -> Tensor:
    """KL(reference || model) of every image [B], in nats, float64, from log probabilities [B, classes]."""
    kl = (reference.exp() * (reference - log_p)).sum(dim=1)
    return kl.clamp_min(0).double()  # rounding can leave a hair below 0


def _outcome(log_p: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Of each image: right, right among the first five, the reference's best class, KL; NaN where there is none."""
    best = log_p.argmax(dim=1)
    labelled = labels >= 0
    own = log_p.gather(1, labels.clamp_min(0).unsqueeze(1))
    classes = torch.arange(log_p.shape[1], device=log_p.device)
    before = (log_p > own) | ((log_p == own) & (classes < labels.unsqueeze(1)))  # equal scores: the lower class first
    several = log_p.shape[1] > _FIRST
    columns = (
        torch.where(labelled, (best == labels).double(), torch.nan),
        torch.where(labelled & several, (before.sum(1) < _FIRST).double(), torch.nan),
        (best == reference.argmax(dim=1)).double(),
        divergence(reference, log_p),
    )
    return torch.stack(columns, 1).cpu()


def _mean(values: Tensor) -> float:
    """Rounded once: it depends neither on an order nor on threads."""
    return math.fsum(values.tolist()) / len(values)


def _standard_error(values: Tensor) -> float | None:
    if len(values) < 2:
        return None
    return math.sqrt(_mean((values - _mean(values)).square()) / (len(values) - 1))
