"""Models from a name and a weight file: what loads, and what is said when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenprune_ext.loading import ModelError, load_model

NAME = "test_vit"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7).state_dict()


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_with_their_number_of_classes(tmp_path: Path, state, suffix: str, wrap: str | None) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    model = load_model(NAME, weights=path)
    assert not model.training
    assert model.num_classes == 7
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_image_size_resamples_the_position_embedding(tmp_path: Path, state) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    model = load_model(NAME, weights=tmp_path / "weights.safetensors", img_size=64)
    assert model.pos_embed.shape[1] == 1 + 16
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])


def test_keys_that_do_not_fit_are_listed(tmp_path: Path, state) -> None:
    path = tmp_path / "weights.pth"
    state["extra.weight"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    del state["blocks.0.attn.qkv.bias"]
    torch.save(state, path)
    with pytest.raises(ModelError) as caught:
        load_model(NAME, weights=path)
    said = str(caught.value)
    assert "1 missing: blocks.0.attn.qkv.bias" in said
    assert "1 unexpected: extra.weight" in said
    assert "1 of another shape: norm.weight (file [3], model [64])" in said


def test_weights_of_another_model_are_refused_in_a_few_lines(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"do not fit test_vit: .* and \d+ more") as caught:
        load_model(NAME, weights=tmp_path / "weights.pth")
    assert len(str(caught.value)) < 2000


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="cannot read weights"):
        load_model(NAME, weights=tmp_path / "weights.pth")
    assert not (tmp_path / "harm-was-done").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.bin"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ModelError, match=f"cannot read weights .*{name}"):
        load_model(NAME, weights=tmp_path / name)


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(2)])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"weights\.pt"):
        load_model(NAME, weights=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "vit_tiny_patch16_225"}, r"no model 'vit_tiny_patch16_225'; did you mean .*vit_tiny_patch16_224"),
        ({"name": "test_vit.no_such_tag"}, "no_such_tag"),
        ({"name": NAME, "weights": "absent.pth"}, r"no such weights file: absent\.pth"),
        ({"name": NAME, "weights": "weights.txt"}, r"expected one of \.safetensors, \.pth"),
        ({"name": NAME, "weights": "a.pth", "pretrained": True}, "not from both"),
        ({"name": "resnet18", "img_size": 64}, r"cannot build resnet18\(img_size=64\)"),
        ({"name": NAME, "img_size": 7}, "smaller than one patch"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(**options)


def test_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"pretrained weights of 'test_vit' .*no route to host.* --weights FILE"):
        load_model(NAME, pretrained=True)
