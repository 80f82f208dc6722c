"""The plain objective against timm's losses."""

from __future__ import annotations

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from toy_training import small_vit

from tokenprune_ext.train import CrossEntropy, Objective
from tokenprune_ext.train.objective import GroupedObjective

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 1, 0])


def test_label_smoothing() -> None:
    model = small_vit()
    loss, parts = CrossEntropy(0.1).loss(model, IMAGES, LABELS)
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(0.1)(model(IMAGES), LABELS))
    assert parts.keys() == {"cross_entropy"}


def test_soft_targets() -> None:
    model, targets = small_vit(), torch.rand(5, 3).softmax(1)
    torch.testing.assert_close(
        CrossEntropy().loss(model, IMAGES, targets)[0], SoftTargetCrossEntropy()(model(IMAGES), targets)
    )


class Fixed(nn.Module):
    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores[: len(images)]


def test_teacher() -> None:
    taught, own = torch.randn(5, 3).log_softmax(1), torch.randn(5, 3).log_softmax(1)
    teacher, model = Fixed(taught), Fixed(own)
    objective = CrossEntropy(teacher=teacher, teacher_weight=2.0)
    objective.prepare(model)
    loss, parts = objective.loss(model, IMAGES, LABELS)
    divergence = sum((t.exp() * (t - o)).sum() for t, o in zip(taught, own, strict=True)) / 5
    torch.testing.assert_close(parts["divergence"], divergence)
    torch.testing.assert_close(loss, parts["cross_entropy"] + 2 * divergence)
    loss.backward()
    assert model.scores.grad is not None
    assert teacher.scores.grad is None


def test_a_model_teaches_itself_nothing() -> None:
    model = small_vit()
    same = small_vit()
    same.load_state_dict(model.state_dict())
    assert CrossEntropy(teacher=same).loss(model.eval(), IMAGES, LABELS)[1]["divergence"].abs() < 1e-6


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        CrossEntropy(1.0)
    with pytest.raises(ValueError, match="teacher_weight must be at least 0, got -1"):
        CrossEntropy(teacher_weight=-1.0)


def test_protocols() -> None:
    objective: Objective = CrossEntropy()
    assert not isinstance(objective, GroupedObjective)
