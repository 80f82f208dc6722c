"""`tokenprune export` as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tokenprune_ext import apply, cli_export
from tokenprune_ext.cli import main
from tokenprune_ext.export import load_program
from tokenprune_ext.loading import load_model
from tokenprune_ext.schedule import Schedule


def run(output: Path, *args: object) -> Result:
    command = ["export", "--model", "test_vit", "--img-size", "64", "--output", output, *args]
    return CliRunner().invoke(main, [str(part) for part in command])


def pruned(inputs: Path, method: str | Schedule = "auto", **how: object) -> torch.nn.Module:
    return apply(load_model("test_vit", img_size=64, weights=inputs / "w.safetensors"), method, **how)


def test_writes_a_program_that_was_checked_on_images(inputs, tmp_path):
    output, labels = tmp_path / "vit.pt2", tmp_path / "labels.txt"
    labels.write_text("cat\ndog\nemu\n")
    how = ("--method", "auto", "--macs", "0.8", "--format", "pt2", "--weights", inputs / "w.safetensors")
    result = run(output, *how, "--labels", labels, "--data", inputs / "images.tsv", "--limit", "3", "--mean", "0.4")
    assert result.exit_code == 0, result.output
    assert f"wrote {output}: pt2, " in result.output
    assert "checked on 3 images: largest difference to the model 0, where" in result.output
    assert "100% have the same largest output" in result.output
    assert "random" not in result.output
    program, model, images = load_program(output), pruned(inputs, macs=0.8), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(program(images), model(images))
    assert program.details["classes"] == "cat\ndog\nemu"
    assert program.details["mean"] == "[0.4, 0.4, 0.4]"
    assert {"std", "interpolation", "crop_pct", "crop_mode"} <= program.details.keys()


def test_labels_have_to_be_those_of_the_model(inputs, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    how = ("--format", "pt2", "--weights", inputs / "w.safetensors", "--labels", tmp_path / "labels.txt")
    result = run(tmp_path / "vit.pt2", *how)
    assert result.exit_code == 2, result.output
    assert "--labels names 2 classes, and the model has 3" in " ".join(result.output.split())


def test_a_schedule_with_a_fixed_batch_on_random_images(inputs, tmp_path):
    schedule = tmp_path / "schedule.json"
    Schedule.build(pruned(inputs, keep=0.7), "topk", keep=0.6).save(schedule)
    result = run(tmp_path / "vit.pt2", "--schedule", schedule, "--format", "pt2", "--batch-size", "6", "--limit", "2")
    assert result.exit_code == 0, result.output
    assert "note: the weights are random" in result.output
    assert "checked on 6 images" in result.output
    program = load_program(tmp_path / "vit.pt2")
    assert program.details["batch"] == "6"
    assert program.schedule == Schedule.load(schedule)


def test_the_dense_model_in_bfloat16(inputs, tmp_path):
    result = run(tmp_path / "vit.pt2", "--format", "pt2", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert load_program(tmp_path / "vit.pt2").details["dtype"] == "bfloat16"


def test_a_difference_is_an_error(tmp_path, monkeypatch):
    write = cli_export._write
    for change in (lambda output: output + 0.1, lambda output: output * float("nan")):
        monkeypatch.setattr(cli_export, "_write", lambda *a, change=change, **k: lambda x: change(write(*a, **k)(x)))
        result = run(tmp_path / "vit.pt2", "--format", "pt2")
        assert result.exit_code == 1
        assert "the difference is more than 0.001 of the largest output (--tolerance)" in result.output
    monkeypatch.setattr(cli_export, "_write", lambda *a, **k: lambda x: write(*a, **k)(x) + 0.1)
    assert run(tmp_path / "vit.pt2", "--format", "pt2", "--tolerance", "1e6").exit_code == 0


def test_onnx_by_the_suffix(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    result = run(tmp_path / "vit.onnx", "--method", "topk", "--keep", "0.7")
    assert result.exit_code == 0, result.output
    assert "vit.onnx: onnx, " in result.output
    assert "100% have the same largest output" in result.output


def test_onnx_without_a_run_time_is_written_and_said_to_be_unchecked(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(tmp_path / "vit.onnx")
    assert result.exit_code == 1, result.output
    assert "vit.onnx, but checking it needs onnxruntime: pip install 'tokenprune[export]'" in result.output
    assert (tmp_path / "vit.onnx").exists()


@pytest.mark.parametrize(
    ("file", "args", "message"),
    [
        ("vit.pt2", [], "a .pt2 file holds either: give --format pt2 or --format aoti"),
        ("vit.pt2", ["--format", "onnx"], "--format onnx is written to a .onnx file"),
        ("vit.pth", [], "expected a .pt2 or .onnx file"),
        ("nowhere/vit.onnx", [], "no such folder"),
        ("vit.pt2", ["--format", "pt2", "--macs", "0.7"], "--layers, --keep and --macs need --method"),
        ("vit.pt2", ["--format", "pt2", "--method", "auto"], "exactly one of keep and macs must be given"),
        ("vit.pt2", ["--format", "pt2", "--method", "best", "--macs", "0.7"], "best"),
        ("vit.pt2", ["--format", "pt2", "--model", "test_vitt"], "did you mean"),
        ("vit.pt2", ["--format", "pt2", "--batch-size", "0"], "--batch-size"),
        ("vit.pt2", ["--format", "pt2", "--mean", "1,2"], "mean takes one or three numbers"),
    ],
)
def test_wrong_usage_is_explained(tmp_path, file, args, message):
    result = run(tmp_path / file, *args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []
