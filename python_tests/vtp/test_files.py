"""Smaller models in files."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vtp.gated_models import gated_host, images_for, train_gates

import tokenprune_ext as tokenprune
from tokenprune_ext import vtp
from tokenprune_ext.loading import ModelError, load_model

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "num_classes": 5}


def dense():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()


def smaller(rate=0.5):
    return vtp.prune(train_gates(vtp.add_gates(dense())), rate)


@pytest.mark.parametrize("method", [None, "peaks"])
def test_built_again_from_the_file(tmp_path, method):
    model = smaller()
    if method is not None:
        tokenprune.apply(model, method, keep=0.7)
    tokenprune.save(model, tmp_path / "m.safetensors")
    loaded = tokenprune.load(tmp_path / "m.safetensors")
    images = images_for(model)
    assert torch.equal(loaded(images), model(images))
    assert vtp.widths_of(loaded) == vtp.widths_of(model)
    assert (method is None) or tokenprune.schedule_of(loaded) == tokenprune.schedule_of(model)


def test_hidden_channels_alone(tmp_path):
    """Then every layer is a plain one, of other sizes than the name says."""
    model = dense()
    kept = [torch.arange(width) for width in (32, 32, 32, 50)] * 2
    places = [f"blocks.{block}.{place}" for block in range(2) for place in vtp.PLACES]
    vtp.narrow(model, dict(zip(places, kept, strict=True)))
    assert model.state_dict().keys() == dense().state_dict().keys()
    tokenprune.save(model, tmp_path / "m.safetensors")
    loaded = tokenprune.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(images_for(model)), model(images_for(model)))


def test_into_a_model_of_these_widths(tmp_path):
    model = smaller()
    tokenprune.save(model, tmp_path / "m.safetensors")
    other = vtp.narrow_to(dense(), vtp.widths_of(model))
    tokenprune.load(tmp_path / "m.safetensors", model=other)
    assert torch.equal(other(images_for(model)), model(images_for(model)))
    with pytest.raises(ModelError, match=r"attn\.qkv"):
        tokenprune.load(tmp_path / "m.safetensors", model=dense())


def test_a_dense_model_says_nothing_of_widths(tmp_path):
    tokenprune.save(dense(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert "widths" not in json.loads(file.metadata()["tokenprune"])["model"]


def test_gates_come_back(tmp_path):
    model = train_gates(vtp.add_gates(dense()))
    tokenprune.save(model, tmp_path / "m.safetensors")
    loaded = tokenprune.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(images_for(model)), model(images_for(model)))
    assert vtp.gates_of(loaded).keys() == vtp.gates_of(model).keys()
    smaller = vtp.prune(loaded, 0.5)
    assert torch.equal(smaller(images_for(model)), vtp.prune(model, 0.5)(images_for(model)))


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_weights_alone_say_which_channels_are_left(tmp_path, rate):
    """As plain weights, for everything that takes a name and a file."""
    torch.manual_seed(0)
    model = vtp.prune(train_gates(vtp.add_gates(timm.create_model("vit_tiny_patch16_224", num_classes=5))), rate).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors")
    assert torch.equal(loaded(images_for(model)), model(images_for(model)))
    with pytest.raises(ModelError, match="do not fit vit_small_patch16_224"):
        load_model("vit_small_patch16_224", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "widths", [[[32, 32, 32, 500]] * 2, [[0, 32, 32, 32]] * 2, [[1, 2, 3]] * 2, [["a"] * 4] * 2, 7]
)
def test_damaged_widths(tmp_path, widths):
    tokenprune.save(smaller(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        about, keys = file.metadata(), list(file.keys())
        state = {key: file.get_tensor(key) for key in keys}
    content = json.loads(about["tokenprune"])
    content["model"]["widths"] = widths
    save_file(state, tmp_path / "m.safetensors", {**about, "tokenprune": json.dumps(content)})
    with pytest.raises(ModelError, match="its model cannot be built"):
        tokenprune.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("widths", "message"),
    [([(8, 8, 8, 8)], "4 widths for each of 4 blocks"), ([(8, 8, 8, 129)] * 4, r"channels 0\.\.127")],
)
def test_widths_that_a_model_does_not_have(widths, message):
    model = gated_host()
    vtp.remove_gates(model)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        vtp.narrow_to(model, widths)
    assert model.state_dict().keys() == before


def test_channels_go_once():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is no dense layer"):
        vtp.narrow_to(smaller(), [(8, 8, 8, 8)] * 2)
