"""Sparsity training as the training loop sees it."""

from __future__ import annotations

import copy

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext import vtp
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.train.objective import DrawingObjective, GroupedObjective
from tokenprune_ext.vtp.objective import SparsityObjective


def test_loss_is_cross_entropy_and_the_penalty():
    model = make_host("deit")
    twin, objective = copy.deepcopy(model), SparsityObjective(0.25, label_smoothing=0.1)
    gated = objective.prepare(model)
    images, labels = images_for(model), torch.tensor([1, 0])
    loss, logged = objective.loss(gated, images, labels)
    expected = torch.nn.functional.cross_entropy(twin(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(logged["cross_entropy"], expected)
    count = sum(len(gate) for gate in vtp.gates_of(gated).values())
    assert logged["penalty"] == count
    torch.testing.assert_close(loss, expected + 0.25 * count)
    loss.backward()
    assert all(value.grad is not None for value in gated.parameters() if value.requires_grad)
    assert objective.finish(gated) is gated


def test_gates_learn_at_their_own_rate_and_do_not_decay():
    objective = SparsityObjective(gate_lr_scale=30)
    gated = objective.prepare(make_host("deit"))
    groups = objective.parameter_groups(gated, 0.05)
    gates = set(map(id, vtp.gates_of(gated).values()))
    assert sum(len(group["params"]) for group in groups) == len(list(gated.parameters()))
    assert groups[0]["lr_scale"] == 1  # whose rate is logged
    for group in groups:
        own = {id(value) in gates for value in group["params"]}
        assert own == {group["lr_scale"] == 30}
        assert all(group["weight_decay"] == (0.05 if value.ndim > 1 else 0) for value in group["params"])
    assert isinstance(objective, GroupedObjective)
    assert not isinstance(objective, DrawingObjective)


def test_only_what_vtp_understands():
    model = make_host("eva02")
    with pytest.raises(UnsupportedModelError, match="VTP supports"):
        SparsityObjective().prepare(model)
    with pytest.raises(ValueError, match="gates already"):
        SparsityObjective().prepare(vtp.add_gates(make_host("deit")))


@pytest.mark.parametrize(
    ("name", "value"), [("l1", -1e-9), ("l1", float("nan")), ("gate_lr_scale", -1), ("label_smoothing", 1)]
)
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        SparsityObjective(**{name: value})
