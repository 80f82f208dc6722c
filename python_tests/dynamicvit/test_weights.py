"""State dicts with the published names, and checkpoints of this package."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenprune_ext as tokenprune
from tokenprune_ext.dynamicvit import add_predictors, predictors_of
from tokenprune_ext.loading import ModelError, load_model

NAME = "deit_tiny_patch16_224"
WIDTHS = {  # shapes of a published predictor, in channels C
    "in_conv.0.weight": (1,),
    "in_conv.0.bias": (1,),
    "in_conv.1.weight": (1, 1),
    "in_conv.1.bias": (1,),
    "out_conv.0.weight": (1 / 2, 1),
    "out_conv.0.bias": (1 / 2,),
    "out_conv.2.weight": (1 / 4, 1 / 2),
    "out_conv.2.bias": (1 / 4,),
    "out_conv.4.weight": (None, 1 / 4),
    "out_conv.4.bias": (None,),
}


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as the authors' files have it: timm's names for the backbone, and three predictors."""
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model(NAME, num_classes=5)
    state = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in model.state_dict().items()}
    for stage in range(3):
        for name, widths in WIDTHS.items():
            shape = [2 if part is None else int(192 * part) for part in widths]
            state[f"score_predictor.{stage}.{name}"] = torch.randn(shape, generator=generator) * 0.1
    return state


@pytest.mark.parametrize("how", ["model", "module.", "safetensors"])
def test_published_files_load_and_prune(tmp_path: Path, published, how):
    path = tmp_path / ("weights.safetensors" if how == "safetensors" else "weights.pth")
    if how == "safetensors":
        save_file(published, path)
    else:
        prefix = "" if how == "model" else how  # as DistributedDataParallel names them
        torch.save({"model": {prefix + key: value for key, value in published.items()}}, path)
    model = load_model(NAME, weights=path)
    assert predictors_of(model).before == (3, 6, 9)
    assert model.state_dict().keys() == published.keys()
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())
    tokenprune.apply(model, "dynamicvit", keep=[137, 96, 67])  # what the authors keep at 0.7
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)
    assert [layer.block for layer in tokenprune.describe(model).layers if layer.scoring_macs] == [2, 5, 8]


def test_published_size_of_the_predictors():
    """DeiT-S with three predictors: the paper's table has 22.1 M parameters for DeiT-S and 22.8 M with them."""
    model = timm.create_model("deit_small_patch16_224")
    dense = sum(parameter.numel() for parameter in model.parameters())
    added = sum(parameter.numel() for parameter in predictors_of(add_predictors(model)).parameters())
    assert dense == pytest.approx(22.1e6, rel=5e-3)
    assert dense + added == pytest.approx(22.8e6, rel=5e-3)


def test_what_does_not_fit_is_listed(tmp_path: Path, published):
    path = tmp_path / "weights.pth"
    state = dict(published)
    state["score_predictor.1.out_conv.4.weight"] = torch.zeros(2, 3)
    del state["score_predictor.2.in_conv.1.bias"]
    state["score_predictor.0.extra"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ModelError) as caught:
        load_model(NAME, weights=path)
    said = str(caught.value)
    assert "1 missing: score_predictor.2.in_conv.1.bias" in said
    assert "1 unexpected: score_predictor.0.extra" in said
    assert "1 of another shape: score_predictor.1.out_conv.4.weight (file [2, 3], model [2, 48])" in said


def test_a_host_that_cannot_carry_them_is_named(tmp_path: Path, published):
    torch.save(published, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"weights.pth hold 3 predictors of DynamicViT: .*DynamicViT is for timm"):
        load_model("deit_tiny_distilled_patch16_224", weights=tmp_path / "weights.pth")


def test_a_checkpoint_of_this_package_holds_them(tmp_path: Path):
    torch.manual_seed(0)
    model = add_predictors(timm.create_model("test_vit", img_size=64, num_classes=3).eval(), (1, 4))
    tokenprune.apply(model, "dynamicvit", layers=[0, 3], keep=[9, 5])
    tokenprune.save(model, tmp_path / "model.safetensors")
    again = tokenprune.load(tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 64, 64)
    assert predictors_of(again).before == (1, 4)
    assert torch.equal(again(images), model(images))
    dense = timm.create_model("test_vit", img_size=64, num_classes=3)
    with pytest.raises(ModelError, match="unexpected: score_predictor"):
        tokenprune.load(tmp_path / "model.safetensors", model=dense)
