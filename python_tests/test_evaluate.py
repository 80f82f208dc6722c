"""Accuracy against hand-computed figures, and what is said about outputs that cannot be evaluated."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune_ext.evaluate import EvaluationError, evaluate


class Lookup(nn.Module):
    """Scores of image i are row i of a table; the image holds its own number in every pixel."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor) -> Tensor:
        return self.scores[images[:, 0, 0, 0].float().long()].to(images.dtype)


def as_batches(labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return list(zip(images.split(size), torch.tensor(labels).split(size), strict=True))


DENSE = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [5.0, 0.0, 0.0]])
PRUNED = torch.tensor([[1.0, 3.0, 0.0], [0.0, 2.0, 1.5], [0.0, 1.0, 1.2], [0.0, 5.0, 0.0]])
LABELS = [0, 1, 2, 1]  # dense: right, right, right, wrong; pruned: wrong, right, right, right


@pytest.mark.parametrize("size", [1, 3, 4])
def test_figures_are_those_computed_by_hand(size: int) -> None:
    done: list[int] = []
    result = evaluate(
        {"dense": Lookup(DENSE), "pruned": Lookup(PRUNED)}, as_batches(LABELS, size), on_batch=done.append
    )
    dense, pruned = result["dense"], result["pruned"]
    assert list(result) == ["dense", "pruned"]
    assert (dense.images, dense.top1, dense.top1_change, dense.agreement, dense.kl) == (4, 0.75, 0.0, 1.0, 0.0)
    assert (pruned.top1, pruned.top1_change, pruned.agreement) == (0.75, 0.0, 0.5)
    # Changes per image -1, 0, 0, 1: variance 2/3 with one degree of freedom less, over 4 images.
    assert pruned.top1_change_se == pytest.approx(math.sqrt(2 / 3) / 2)
    log_p, log_q = DENSE.double().log_softmax(1), PRUNED.double().log_softmax(1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert pruned.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert pruned.kl_se == pytest.approx(float(kl.std()) / 2, rel=1e-5)
    assert sum(done) == 4


def test_top5_counts_labels_among_the_five_best_scores() -> None:
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5, 6], [1.0] * 7, [1.0] * 7])
    model = {"dense": Lookup(scores)}
    assert evaluate(model, as_batches([4, 1, 4, 5], 3))["dense"].top5 == 0.5  # of equal scores the lower class is first
    assert evaluate(model, as_batches([-1] * 4, 3))["dense"].top5 is None
    assert evaluate({"dense": Lookup(DENSE)}, as_batches(LABELS, 4))["dense"].top5 is None  # of three classes


def test_without_labels_only_agreement_is_known() -> None:
    models = {"dense": Lookup(DENSE), "pruned": Lookup(PRUNED)}
    pruned = evaluate(models, as_batches([-1] * 4, 2))["pruned"]
    assert (pruned.top1, pruned.top1_change, pruned.top1_change_se) == (None, None, None)
    assert pruned.agreement == 0.5
    assert pruned.kl > 0


def test_one_image_has_no_standard_error() -> None:
    accuracy = evaluate({"dense": Lookup(DENSE)}, as_batches([0], 1))["dense"]
    assert (accuracy.top1, accuracy.top1_change_se, accuracy.kl_se) == (1.0, None, None)


def test_images_are_cast_and_scores_compared_in_float32() -> None:
    accuracy = evaluate({"dense": Lookup(DENSE)}, as_batches(LABELS, 2), dtype=torch.bfloat16)["dense"]
    assert accuracy.top1 == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_named(value: float) -> None:
    broken = PRUNED.clone()
    broken[3, 1] = value
    with pytest.raises(EvaluationError, match=r"pruned: .*not finite for 1 of 2 images .* image 3 "):
        evaluate({"dense": Lookup(DENSE), "pruned": Lookup(broken)}, as_batches(LABELS, 2))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2)])
def test_output_that_is_no_scores_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError, match="expected scores of shape"):
        evaluate({"dense": Lookup(torch.zeros(shape))}, as_batches(LABELS, 2))


def test_no_images_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no images"):
        evaluate({"dense": Lookup(DENSE)}, [])
