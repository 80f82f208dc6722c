"""DynamicViT as the training loop sees it."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamicvit.models import make
from host_models import images_for, make_host

from tokenprune_ext.dynamicvit import MaskedViT, add_predictors, loss, predictors_of, teach
from tokenprune_ext.dynamicvit.objective import DynamicViTObjective, Student
from tokenprune_ext.prune import apply, describe


def test_loss_is_the_objective():
    model = make()
    teacher, twin = copy.deepcopy(model), copy.deepcopy(model)
    objective = DynamicViTObjective(teacher, 0.6, ratio_weight=3.0)
    images, labels = images_for(model), torch.tensor([3, 1])
    student = objective.prepare(model)
    torch.manual_seed(0)
    total, logged = objective.loss(student, images, labels)
    torch.manual_seed(0)
    masked = MaskedViT(twin).train()(images)
    expected = loss(masked, teach(teacher, images), labels, 0.6, ratio_weight=3.0)
    assert torch.equal(total, expected.total)
    assert set(logged) == {"classification", "ratio", "tokens", "kl", "kept"}
    assert torch.equal(logged["kept"], masked.masks[:, -1].mean())
    total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_in_eval_mode_it_is_the_pruned_model():
    model = make()
    pruned = apply(copy.deepcopy(model), "dynamicvit", layers=[0, 1, 2], keep=0.6)
    images = images_for(model)
    student = Student(model, 0.6)
    keys = set(student.state_dict())
    assert torch.equal(student.eval()(images), pruned(images))
    assert torch.equal(copy.deepcopy(student)(images), pruned(images))
    assert set(student.state_dict()) == keys
    assert student.train()(images).masks.shape == (2, 3, 16)


def test_a_dense_model_gets_predictors_and_leaves_pruned():
    model = make_host("vit")
    objective = DynamicViTObjective(copy.deepcopy(model), before=(1, 3))
    student = objective.prepare(model)
    assert predictors_of(model).before == (1, 3)
    assert objective.finish(student) is model
    assert describe(model).method == "dynamicvit"
    assert [layer.tokens_out for layer in describe(model).layers] == [1 + 11, 1 + 11, 1 + 7, 1 + 7]
    assert not model.training


def test_predictors_learn_faster():
    model = make()
    objective = DynamicViTObjective(copy.deepcopy(model), backbone_lr_scale=0.1)
    student = objective.prepare(model)
    groups = objective.parameter_groups(student, 0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, student.parameters()))
    own = set(map(id, predictors_of(model).parameters()))
    assert groups[0]["lr_scale"] == 1.0  # the first is the one that is logged
    for group in groups:
        assert len({id(parameter) in own for parameter in group["params"]}) == 1
        assert group["lr_scale"] == (1.0 if id(group["params"][0]) in own else 0.1)
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_bad_settings_are_refused():
    teacher = make_host("vit")
    for options, message in (
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
        ({"backbone_lr_scale": float("nan")}, "backbone_lr_scale must be at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            DynamicViTObjective(teacher, **options)
    with pytest.raises(ValueError, match="the teacher has channels 32, the model 64"):
        DynamicViTObjective(teacher).prepare(make_host("vit", embed_dim=64))
    with pytest.raises(ValueError, match="the model is pruned"):
        Student(apply(add_predictors(make_host("vit")), "topk", keep=0.5), 0.7)
