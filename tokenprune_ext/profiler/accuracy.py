"""The accuracy proxy: how well a model does when random tokens are removed at its first layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune_ext.compare import share
from tokenprune_ext.evaluate import Accuracy, evaluate
from tokenprune_ext.methods import Random
from tokenprune_ext.patch import inspect_host

from .journal import Records
from .models import prune_to

_AT_ONCE = 8  # token counts that share one pass of the dense model


def measure_accuracy(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    counts: Iterable[int],
    records: Records,
    *,
    seed: int = 0,
    on_count: Callable[[int], None] = lambda done: None,
) -> dict[int, float]:
    """Accuracy by patch tokens kept: top-1, or without labels agreement with the dense model.

    Random tokens are removed at the first layer, the same for every image. Counts that are recorded are not evaluated
    again; the others are recorded, eight at a time.

    Args:
        model: a dense classifier on its device, in its dtype; it is not changed.
        batches: (float images [B, 3, H, W], labels [B]); labels below 0 mean unlabelled, for all images or none.
        counts: patch tokens to keep.
        records: where results go.
        seed: of the choice of the tokens.
        on_count: called with the number of counts done.

    Raises:
        EvaluationError: no images, or an output that cannot be evaluated.

    Source: arXiv 2407.05941, section 3.
    """
    host = inspect_host(model)
    parameter = next(model.parameters())
    counts = sorted(counts)
    missing = iter([tokens for tokens in counts if tokens not in records.accuracy])
    while chunk := list(islice(missing, _AT_ONCE)):
        variants = {str(n): prune_to(share(model), Random(seed=seed), 0, n, host) for n in chunk}
        found = evaluate({"dense": model, **variants}, batches, device=parameter.device, dtype=parameter.dtype)
        for tokens in chunk:
            records.add_accuracy(tokens, _values(found[str(tokens)]))
        on_count(sum(tokens in records.accuracy for tokens in counts))
    return {tokens: records.accuracy[tokens]["value"] for tokens in counts}


def data_facts(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], seed: int) -> dict[str, Any]:
    """What must be the same for two accuracies to belong together: weights and images by their content."""
    return {
        "images": sum(len(labels) for _, labels in batches),
        "labelled": all(bool((labels >= 0).all()) for _, labels in batches),
        "content": _digest(tensor for batch in batches for tensor in batch),
        "weights": _digest(model.state_dict().values()),
        "seed": seed,
    }


def _values(found: Accuracy) -> dict[str, Any]:
    """The value, and the standard error of its difference to dense (of agreement: of itself)."""
    if found.top1 is not None:
        return {"measure": "top-1", "value": found.top1, "se": found.top1_change_se or 0.0}
    error = (found.agreement * (1 - found.agreement) / found.images) ** 0.5
    return {"measure": "agreement with dense", "value": found.agreement, "se": error}


def _digest(tensors: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
