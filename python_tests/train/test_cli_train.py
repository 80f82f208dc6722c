"""`tokenprune train`: runs on files and on the package's own images, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from toy_training import rows

from tokenprune_ext import checkpoint
from tokenprune_ext.cli_train import train
from tokenprune_ext.demo import load_model


def run(*args: object) -> Result:
    return CliRunner().invoke(train, ["finetune", *map(str, args)])


def on_files(inputs: Path, *more: object) -> list[object]:
    model = ("--model", "test_vit", "--img-size", 64, "--weights", inputs / "w.safetensors", "--device", "cpu")
    return [*model, "--data", inputs / "images.tsv", "--batch-size", 4, "--epochs", 2, *more]


def test_image_files(inputs: Path, tmp_path: Path) -> None:
    augment = ("--auto-augment", "rand-m5", "--erase", 0.5, "--mixup", 0.2, "--label-smoothing", 0.1, "--distill", 1)
    command = on_files(inputs, "--held-out", inputs / "images.tsv", *augment, "--output", tmp_path / "run")
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "epoch 2, step 4: loss " in done.output
    assert f"wrote {tmp_path / 'run' / 'model.safetensors'} after 4 steps, top-1 " in done.output
    last = rows(tmp_path / "run")[-1]
    total = float(last["cross_entropy"]) + float(last["divergence"])
    assert float(last["loss"]) == pytest.approx(total)
    model = checkpoint.load(tmp_path / "run" / "model.safetensors")
    trained, before = model.state_dict(), load_file(inputs / "w.safetensors")
    assert trained.keys() == before.keys()
    assert not torch.equal(trained["head.weight"], before["head.weight"])
    again = run(*command)
    assert "resumed at step 4 of 4" in again.output
    other = run(*command, "--distill", 2)
    assert other.exit_code == 2
    assert "distill was 1.0 and is now 2.0" in other.output


def test_generated_images(tmp_path: Path) -> None:
    sizes = ("--images", 8, "--held-out-images", 4, "--batch-size", 4, "--epochs", 1, "--device", "cpu")
    done = run("--demo", *sizes, "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    state = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in load_model().state_dict().items():
        assert (state[name] - value).abs().max() < 0.01
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["images"], settings["demo"], settings["method"]) == (8, True, "finetune")
    further = run("--demo", *sizes, "--weights", tmp_path / "run" / "model.safetensors", "--output", tmp_path / "more")
    assert further.exit_code == 0, further.output
    fresh = run("--demo", "--scratch", *sizes, "--output", tmp_path / "fresh")
    assert fresh.exit_code == 0, fresh.output
    assert float(rows(tmp_path / "fresh")[0]["loss"]) > 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give either --demo or --model NAME"),
        (("--demo", "--model", "test_vit"), "give either --demo or --model NAME"),
        (("--demo", "--data", "."), "--demo has a model and images of its own: no --data"),
        (("--demo", "--scratch", "--pretrained"), "give one of --weights FILE, --pretrained and --scratch"),
        (("--model", "test_vit"), "give one of --weights FILE, --pretrained and --scratch"),
        (("--model", "test_vit", "--scratch"), "Missing option '--data'"),
        (("--model", "test_vlt", "--scratch", "--data", "."), "timm has no model 'test_vlt'; did you mean test_vit"),
        (("--demo", "--opt", "nothing"), "timm has no optimiser 'nothing'"),
        (("--demo", "--epochs", "2", "--warmup-epochs", "2"), "warmup_epochs must be below the 2 epochs"),
        (("--demo", "--sched", "plateau"), "sched must be one of cosine, poly, step, tanh"),
        (("--demo", "--lr", "0"), "0.0 is not in the range x>0"),
        (("--demo", "--crop-scale", "0"), "crop-scale"),
        (("--demo", "--auto-augment", "nonsense"), "auto-augment 'nonsense'"),
        (("--demo", "--device", "cuda:99"), "expected cpu, cuda or cuda:N|sees"),
    ],
)
def test_wrong_input(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    small = ("--images", 2, "--held-out-images", 2, "--epochs", 1)  # soon done, should it not be refused
    done = run(*small, *args, "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert any(part in " ".join(done.output.split()) for part in said.split("|")), done.output
    assert not (tmp_path / "run").exists()


def test_wrong_files(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text(f"{inputs}/images/0.png\t7\n")
    (tmp_path / "plain.tsv").write_text(f"{inputs}/images/0.png\n")
    save_file({"head.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    for more, said in [
        (("--data", tmp_path / "list.tsv"), "class index 7 is outside the model's classes 0..2"),
        (("--data", tmp_path / "plain.tsv"), "the images have no labels to train on"),
        (("--held-out", tmp_path / "plain.tsv"), "the images have no labels to train on"),
        (("--weights", tmp_path / "other.safetensors"), "do not fit test_vit"),
        (("--weights", tmp_path / "list.tsv"), "expected one of .safetensors"),
    ]:
        done = run(*on_files(inputs, *more, "--output", tmp_path / "run"))
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split())
    demo = run("--demo", "--weights", inputs / "w.safetensors", "--output", tmp_path / "run")
    assert "do not fit vit_demo" in demo.output
    assert not (tmp_path / "run").exists()


def test_divergence(inputs: Path, tmp_path: Path) -> None:
    done = run(*on_files(inputs, "--lr", 1e30, "--clip-grad", 1e30, "--opt", "sgd", "--output", tmp_path / "run"))
    assert done.exit_code == 1
    assert "there is no checkpoint yet" in " ".join(done.output.split())
    assert "Traceback" not in done.output
