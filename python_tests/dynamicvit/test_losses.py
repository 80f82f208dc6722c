"""The objective, term by term, and that it does what it is for."""

from __future__ import annotations

import pytest
import torch
from dynamicvit.models import make, noise_of
from host_models import images_for
from torch.nn import functional as F

from tokenprune_ext.dynamicvit import Dense, Masked, MaskedViT, loss, predictors_of, ratio_loss, teach


def outputs() -> tuple[Masked, Dense]:
    torch.manual_seed(0)
    masks = (torch.rand(3, 2, 5) < 0.5).float()
    masks[:, 1] *= masks[:, 0]
    return Masked(torch.randn(3, 4), torch.randn(3, 5, 8), masks), Dense(torch.randn(3, 4), torch.randn(3, 5, 8))


def test_terms_are_those_of_the_paper():
    student, teacher = outputs()
    labels = torch.tensor([0, 3, 1])
    found = loss(student, teacher, labels, 0.7)
    ratio = sum((sum(student.masks[b, s].tolist()) / 5 - 0.7 ** (s + 1)) ** 2 for b in range(3) for s in range(2)) / 6
    tokens = 0.0
    for b in range(3):
        there = [i for i in range(5) if student.masks[b, 1, i]]
        squares = [float((student.tokens[b, i] - teacher.tokens[b, i]).pow(2).mean()) for i in there]
        tokens += sum(squares) / max(len(there), 1) / 3
    p, q = teacher.logits.softmax(-1), student.logits.softmax(-1)
    expected = (
        F.cross_entropy(student.logits, labels).item(),
        ratio,
        tokens,
        (p * (p / q).log()).sum().item() / 3,
    )
    assert [term.item() for term in found[1:]] == pytest.approx(expected, rel=1e-5)
    weighted = sum(weight * term for weight, term in zip((1, 2, 0.5, 0.5), expected, strict=True))
    assert found.total.item() == pytest.approx(weighted, rel=1e-5)


def test_weights_and_criterion_are_options():
    student, teacher = outputs()
    probabilities = torch.full((3, 4), 0.25)
    found = loss(student, teacher, probabilities, 0.7, ratio_weight=0, tokens_weight=0, kl_weight=0)
    assert torch.equal(found.total, found.classification)
    twice = loss(student, teacher, probabilities, 0.7, criterion=lambda *given: 2 * F.cross_entropy(*given))
    torch.testing.assert_close(twice.classification, 2 * found.classification)


def test_no_token_left_gives_no_nan():
    student, teacher = outputs()
    found = loss(student._replace(masks=torch.zeros(3, 2, 5)), teacher, torch.tensor([0, 1, 2]), 0.5)
    assert found.tokens == 0
    assert found.total.isfinite()


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan")])
def test_a_bad_target_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        ratio_loss(torch.ones(1, 1, 4), keep)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_ratio_loss_pushes_the_kept_share_to_the_target(keep):
    student = MaskedViT(make("deit", img_size=96)).train()
    images, noise = images_for(student.model, batch=8), noise_of(0)
    optimizer = torch.optim.Adam(predictors_of(student.model).parameters(), lr=1e-2)
    history = []
    for _ in range(100):
        masks = student(images, noise=noise).masks
        history.append(masks.detach().mean((0, 2)))
        optimizer.zero_grad()
        ratio_loss(masks, keep).backward()
        optimizer.step()
    targets = torch.tensor([keep, keep**2, keep**3])
    assert (history[0] - targets).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(history[-20:]).mean(0), targets, rtol=0, atol=0.05)


def test_training_lowers_the_objective():
    """Labels from a teacher: a student with the same weights and few tokens gets closer to it."""
    teacher, student = make(), MaskedViT(make()).train()
    images, noise = images_for(teacher, batch=8), noise_of(0)
    taught = teach(teacher, images)
    labels = taught.logits.argmax(1)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    totals = []
    for _ in range(40):
        found = loss(student(images, noise=noise), taught, labels, 0.7)
        totals.append(found.total.item())
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])
