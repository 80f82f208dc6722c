"""The folder of a run: nothing of another run or of something else is overwritten, and wrong input writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_training import CLASSES, Colours, colours, options, small_vit, stored, toy

from tokenprune_ext.data import DataError, ImageFiles
from tokenprune_ext.train import CrossEntropy, Options, RunError, TrainingData, train
from tokenprune_ext.train.state import claim


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(lr=0.5), "lr was 0.001 and is now 0.5"),
        (dict(epochs=3), "epochs was 2 and is now 3"),
        (dict(batch_size=8, seed=1), "batch_size was 7 and is now 8; seed was 0 and is now 1"),
        (dict(held_out=5), "held-out images was 6 and is now 5"),
    ],
)
def test_other_settings(folder: Path, changed: dict[str, Any], said: str) -> None:
    before = content(folder)
    with pytest.raises(RunError, match=f"{folder} is of another run: {said}[.] Resume"):
        toy(folder, **changed)
    assert content(folder) == before


def test_settings_without_effect_on_the_weights(folder: Path) -> None:
    toy(folder, workers=1, log_every=1, save_every=1)


def test_another_model_or_method(folder: Path) -> None:
    other = small_vit()
    with torch.no_grad():
        other.head.bias[0] += 1
    before = content(folder)
    with pytest.raises(RunError, match=r"initial weights was [0-9a-f]{16} and is now"):
        train(other, CrossEntropy(0.1), colours(), options(), folder)
    with pytest.raises(RunError, match=r"rate was not set and is now 0\.4"):
        train(small_vit(), CrossEntropy(0.1), colours(), options(), folder, settings={"rate": 0.4})
    assert content(folder) == before


def test_a_checkpoint_of_another_run(folder: Path, tmp_path: Path) -> None:
    toy(tmp_path / "other", lr=0.5)
    (folder / "checkpoint.pt").write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    before = content(folder)
    with pytest.raises(RunError, match=r"checkpoint\.pt is of another run: lr was 0\.5 and is now 0\.001"):
        toy(folder)
    assert content(folder) == before


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("how", ["cut short", "code", "format", "settings"])
def test_damaged_files(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    path = folder / "checkpoint.pt"
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "code":
        torch.save({"format": 1, "settings": Harmful()}, path)
    elif how == "format":
        torch.save({**stored(folder), "format": 99}, path)
    else:
        path = folder / "run.json"
        path.write_text("{")
    before = content(folder)
    with pytest.raises(RunError, match=f"{path}( has format 99|: )"):
        toy(folder)
    assert content(folder) == before
    assert not Path("harm").exists()


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    (tmp_path / "file").write_text("")
    before = content(tmp_path)
    for name, said in [
        ("mine", "is not empty and holds no training run"),
        ("file", "is a file"),
        ("no/where", "no such folder"),
    ]:
        with pytest.raises(RunError, match=said):
            toy(tmp_path / name)
    assert content(tmp_path) == before


def test_one_run_at_a_time(folder: Path) -> None:
    settings = json.loads((folder / "run.json").read_text())["settings"]
    with claim(folder, settings, {}):
        before = content(folder)
        with pytest.raises(RunError, match=f"another process is training in {folder}"):
            toy(folder)
        assert content(folder) == before
    toy(folder)


def images(tmp_path: Path, labels: tuple[int, ...] | None) -> TrainingData:
    for index in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.png")
    files = ImageFiles(tuple(tmp_path / f"{index}.png" for index in range(3)), labels)
    return TrainingData(files, colours().transform, CLASSES)


def test_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for data, said in [
        (images(tmp_path, None), "the images have no labels to train on"),
        (images(tmp_path, (0, 1, 3)), "labels from 0 to 3 do not fit the model's 3 classes"),
        (TrainingData(Colours(0), colours().transform, CLASSES), "0 images of 3 classes are nothing to train on"),
    ]:
        with pytest.raises(RunError, match=said):
            train(small_vit(), CrossEntropy(), data, options(), output)
    with pytest.raises(RunError, match=r"cls_token is torch\.bfloat16: weights are trained in float32"):
        train(small_vit().bfloat16(), CrossEntropy(), colours(), options(), output)
    assert not output.exists()


def test_an_objective_that_refuses_writes_nothing(tmp_path: Path) -> None:
    class Refuses(CrossEntropy):
        def prepare(self, model: Any) -> Any:
            raise ValueError("no gates here")

    with pytest.raises(ValueError, match="no gates here"):
        train(small_vit(), Refuses(), colours(), options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(tmp_path: Path, workers: int) -> None:
    data = images(tmp_path, (0, 1, 2))
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read image .*1\.png"):
        train(small_vit(), CrossEntropy(), data, options(workers=workers), tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(lr=0.0), "lr must be above 0"),
        (dict(lr=float("nan")), "lr must be at least 0, got nan"),
        (dict(clip_grad=0.0), "clip_grad must be above 0"),
        (dict(warmup_epochs=2.0), "warmup_epochs must be below the 2 epochs, got 2"),
        (dict(amp="int8"), "amp must be one of none, bfloat16, float16, got 'int8'"),
        (dict(sched="cosin"), "sched must be one of cosine, poly, step, tanh, got 'cosin'"),
        (dict(opt="adamv"), "timm has no optimiser 'adamv'; there are adam,"),
    ],
)
def test_bad_options(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**{**dict(epochs=2), **changed})
