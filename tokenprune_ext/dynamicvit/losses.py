"""What DynamicViT is trained for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .masked import Dense, Masked


class Losses(NamedTuple):
    """Scalars: the weighted sum, and its terms without their weights."""

    total: Tensor
    classification: Tensor
    ratio: Tensor
    tokens: Tensor
    kl: Tensor


def loss(
    student: Masked,
    teacher: Dense,
    labels: Tensor,
    keep: float,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ratio_weight: float = 2.0,
    tokens_weight: float = 0.5,
    kl_weight: float = 0.5,
) -> Losses:
    """The training objective: classification + 2 ratio + 0.5 tokens + 0.5 KL.

    Args:
        student: what ``MaskedViT`` returned.
        teacher: what the dense model says of the same images (``teach``).
        labels: whatever ``criterion`` takes: class indices ``[B]``, or probabilities ``[B, classes]`` after mixup.
        keep: target keep ratio rho in (0, 1] of each stage; rho, rho^2, rho^3, ... of all patches are left behind them.
        criterion: classification loss of logits and labels.
        ratio_weight: weight of the squared distance of each image's kept share from the target, mean over the stages.
        tokens_weight: weight of the squared distance of the last patch tokens from the teacher's, mean over their
            channels, the tokens that are still there, and the images.
        kl_weight: weight of KL(teacher || student) of the class distributions, mean over the images.

    Raises:
        ValueError: ``keep`` is not in (0, 1].

    Source: DynamicViT (NeurIPS 2021), section 3.3 and equation 14.
    """
    terms = (
        criterion(student.logits, labels),
        ratio_loss(student.masks, keep),
        token_loss(student, teacher),
        kl_loss(student.logits, teacher.logits),
    )
    total = sum(weight * term for weight, term in zip((1, ratio_weight, tokens_weight, kl_weight), terms, strict=True))
    assert isinstance(total, Tensor)
    return Losses(total, *terms)


def ratio_loss(masks: Tensor, keep: float) -> Tensor:
    """Mean over images and stages of (kept share - keep^stage)^2, of masks ``[B, stages, n]``."""
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    targets = keep ** torch.arange(1, masks.shape[1] + 1, device=masks.device, dtype=masks.dtype)
    return (masks.mean(-1) - targets).square().mean()


def token_loss(student: Masked, teacher: Dense) -> Tensor:
    """Squared distance of the tokens that are still there from the teacher's: mean over them, then over the images."""
    there = student.masks[:, -1].detach()
    distance = (student.tokens - teacher.tokens).to(there.dtype).square().mean(-1)
    return ((distance * there).sum(1) / there.sum(1).clamp_min(1)).mean()


def kl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits ``[B, classes]``, mean over the images."""
    wide = torch.promote_types(student.dtype, torch.float32)
    of_student, of_teacher = student.log_softmax(-1, dtype=wide), teacher.log_softmax(-1, dtype=wide)
    return F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)
