"""The predictor against plain loops, and which models can have one."""

from __future__ import annotations

import pytest
import torch
from dynamicvit.models import make
from dynamicvit.slow import predict
from host_models import images_for, make_host

from tokenprune_ext import UnsupportedModelError
from tokenprune_ext.dynamicvit import Predictor, add_predictors, default_places, predictors_of


@pytest.mark.parametrize("masked", [False, True])
def test_predictor_is_that_of_the_paper(masked):
    torch.manual_seed(0)
    predictor = Predictor(16).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    there = torch.rand(3, 7) < 0.6
    there[:, 0] = True
    found = predictor(x, there.double() if masked else None)
    for image in range(3):
        slow = predict(predictor, x[image].tolist(), there[image].tolist() if masked else [True] * 7)
        torch.testing.assert_close(found[image], torch.tensor(slow, dtype=torch.float64))


def test_an_image_without_tokens_gives_no_nan():
    assert Predictor(8)(torch.randn(1, 4, 8), torch.zeros(1, 4)).isfinite().all()


def test_half_precision_gives_float32_scores():
    assert Predictor(8).bfloat16()(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_places():
    assert default_places(12) == (3, 6, 9)
    assert default_places(24) == (6, 12, 18)
    assert default_places(12, 2) == (4, 8)
    assert default_places(3) == (1, 2)


def test_predictors_are_a_part_of_the_model_with_the_published_names():
    model = make_host("deit", torch.float64)
    images = images_for(model)
    dense, keys = model(images), set(model.state_dict())
    torch.manual_seed(0)
    assert add_predictors(model, (2,)) is model
    parts = ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
    added = {f"score_predictor.0.{part}.{name}" for part in parts for name in ("weight", "bias")}
    assert set(model.state_dict()) - keys == added
    assert model.state_dict()["score_predictor.0.out_conv.4.weight"].shape == (2, 8)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    assert not predictors_of(model).training
    assert torch.equal(model(images), dense)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("deit_distilled", "VisionTransformerDistilled .* DynamicViT is for timm's VisionTransformer"),
        ("eva", "DynamicViT is for timm's VisionTransformer"),
        ("siglip", "reads the class token alone"),
        ("reg4_gap", "reads the class token alone"),
    ],
)
def test_other_models_are_refused(host, message):
    model = make_host(host)
    keys = set(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        add_predictors(model)
    assert set(model.state_dict()) == keys


def test_bad_places_are_refused():
    model = make_host("vit")
    for before in ((), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match="ascending without repeats"):
            add_predictors(model, before)
    with pytest.raises(ValueError, match="before must be at least 1, got 0"):
        add_predictors(model, (0, 1))
    with pytest.raises(ValueError, match=r"before must be at most 3 \(the last block\), got 4"):
        add_predictors(model, (4,))
    with pytest.raises(TypeError, match="before must be an int"):
        add_predictors(model, (1.0,))
    with pytest.raises(ValueError, match="no trained predictors"):
        predictors_of(model)
    with pytest.raises(ValueError, match="has predictors already"):
        add_predictors(make())
