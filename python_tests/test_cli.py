"""The command line: whole runs on a small random model, files it writes, and an explanation for every wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tokenprune_ext.cli import main
from tokenprune_ext.cli_compare import METHODS
from tokenprune_ext.cli_values import default_device, parse_methods
from tokenprune_ext.demo.model import WEIGHTS_PATH
from tokenprune_ext.schedule import Schedule

MODEL = ("--model", "test_vit", "--img-size", "64")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def compare_args(inputs: Path, output: Path, **options: object) -> list[object]:
    """Arguments of a quick comparison; an option set to None is left out, one set to True is a flag."""
    given: dict[str, object] = {
        "weights": inputs / "w.safetensors",
        "data": inputs / "images.tsv",
        "methods": "topk,pomt",
        "budgets": "0.8,0.6",
        "batch-size": 4,
        "workers": 0,
        "latency-budget": 0,
        "output": output,
        **options,
    }
    args: list[object] = ["compare", *(() if "model" in options else MODEL)]
    for name, value in given.items():
        if value is not None:
            args += [f"--{name}"] if value is True else [f"--{name}", value]
    return args


def assert_usage_error(result: Result, *said: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    message = " ".join(result.output.split())
    for words in said:
        assert words in message


def test_compare_prints_a_table_and_writes_a_report(inputs: Path, tmp_path: Path, memory_kept: list[str]) -> None:
    args = compare_args(inputs, tmp_path / "report")
    result = run(*args)
    assert result.exit_code == 0, result.output
    rows = ["dense", "topk 80 %", "topk 60 %", "pomt 80 %", "pomt 60 %"]
    assert all(row in result.output for row in rows)
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert [row["name"] for row in report["rows"]] == rows
    assert report["command"] == "tokenprune " + " ".join(map(str, args))
    assert report["settings"]["images"] == 8
    assert all(row["latency"] is not None for row in report["rows"])
    assert memory_kept == [default_device()]
    html = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "pomt 60 %" in html
    assert "5.png" not in html  # pictures are of images 0, 2, 4, 6
    assert "6.png" in html


def test_compare_options_reach_the_comparison(inputs: Path, tmp_path: Path, memory_kept: list[str]) -> None:
    schedule = Schedule.build(timm.create_model("test_vit", img_size=64), "topk", layers=[1], keep=[9])
    schedule.save(tmp_path / "mine.json")
    options = {"methods": "topk,zero_tprune:start=uniform:iters=(3,2,1)", "schedule": tmp_path / "mine.json"}
    options |= {"limit": 5, "no-latency": True, "unlabelled": True, "dtype": "bfloat16", "threads": 1}
    options |= {"mean": "0.1,0.2,0.3", "std": "0.5", "interpolation": "bilinear", "crop-pct": 0.8}
    result = run(*compare_args(inputs, tmp_path, **options))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["settings"]["images"] == 5
    assert report["settings"]["dtype"].startswith("bfloat16")
    preprocessing = report["settings"]["preprocessing"]
    assert (preprocessing["mean"], preprocessing["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert (preprocessing["interpolation"], preprocessing["crop_pct"]) == ("bilinear", 0.8)
    assert report["rows"][-1]["name"] == "mine"
    assert report["rows"][-1]["schedule"]["keep"] == {"1": 9}
    zero_tprune = report["rows"][3]
    assert zero_tprune["name"] == "zero_tprune:start=uniform:iters=(3,2,1) 80 %"
    assert zero_tprune["schedule"]["options"]["iters"] == [3, 2, 1]
    assert all(row["latency"] is None and row["accuracy"]["top1"] is None for row in report["rows"])
    assert not memory_kept


def test_dense_with_an_option_is_a_row_of_its_own(inputs: Path, tmp_path: Path) -> None:
    methods = "dense:class_token_only=true,peaks,tome"
    result = run(*compare_args(inputs, tmp_path, **{"methods": methods, "budgets": "0.8", "no-latency": True}))
    assert result.exit_code == 0, result.output
    assert "note:" not in result.output
    rows = json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["dense", "dense:class_token_only=true", "peaks 80 %", "tome 80 %"]
    assert [row["macs"]["scoring"] > 0 for row in rows] == [False, False, True, True]
    assert all(row["macs"]["charged_fraction"] <= 0.8 for row in rows[2:])
    assert "with scoring, G" in result.output


def test_limit_is_the_same_choice_for_the_same_seed(inputs: Path, tmp_path: Path) -> None:
    kl = []
    for seed in (1, 1, 2):
        options = {"limit": 3, "seed": seed, "methods": "random", "budgets": "0.6", "no-latency": True}
        assert run(*compare_args(inputs, tmp_path, **options)).exit_code == 0
        kl.append(json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"][1]["accuracy"]["kl"])
    assert kl[0] == kl[1] != kl[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": None}, ["either --weights FILE or --pretrained", "random weights"]),
        ({"pretrained": True}, ["either --weights FILE or --pretrained"]),
        ({"weights": "absent.pth"}, ["--weights", "absent.pth", "does not exist"]),
        ({"data": "absent"}, ["--data", "absent", "does not exist"]),
        ({"model": "vit_tiny_patch16_244"}, ["no model 'vit_tiny_patch16_244'", "did you mean vit_tiny_patch16_224"]),
        ({"model": "resnet18"}, ["do not fit resnet18", "missing", "unexpected"]),
        ({"model": "test_vit"}, ["of another shape: pos_embed (file [1, 17, 64], model [1, 101, 64])"]),
        ({"methods": "topk,best"}, ["unknown method 'best'", "topk"]),
        ({"methods": "topk:speed=3"}, ["no option speed"]),
        ({"methods": "zero_tprune:tau=-1"}, ["tau", "-1"]),
        ({"methods": "topk:speed"}, ["expected name:option=value, got 'speed'"]),
        ({"methods": ","}, ["nothing to compare"]),
        ({"methods": "pomt", "budgets": "0.01"}, ["nothing to compare", "0.01"]),
        ({"budgets": "0.5,2"}, ["--budgets", "2 is not in (0, 1]"]),
        ({"budgets": "half"}, ["--budgets", "'half'"]),
        ({"mean": "0.5,0.5"}, ["mean takes one or three numbers, got 2"]),
        ({"device": "tpu"}, ["--device", "expected cpu, cuda or cuda:N"]),
        ({"device": "cuda:99"}, ["--device", "CUDA devices"]),
        ({"dtype": "int8"}, ["--dtype"]),
        ({"limit": 0}, ["--limit"]),
    ],
)
def test_wrong_options_are_explained(inputs: Path, tmp_path: Path, options: dict[str, object], said: list[str]) -> None:
    assert_usage_error(run(*compare_args(inputs, tmp_path / "report", **options)), *said)


def test_wrong_files_are_explained(inputs: Path, tmp_path: Path) -> None:
    def compare(**options: object) -> Result:
        return run(*compare_args(inputs, **{"output": tmp_path / "report", **options}))

    listing = tmp_path / "list.tsv"
    image = inputs / "images" / "0.png"
    listing.write_text(f"{image}\t2\n{image}\t3\n")
    assert_usage_error(compare(data=listing), "list.tsv, line 2: class index 3 is outside the model's classes 0..2")
    (tmp_path / "bad.png").write_bytes(b"no image")
    listing.write_text(f"{image}\t0\nbad.png\t1\n")
    assert_usage_error(compare(data=listing), "cannot read image", "bad.png")
    (tmp_path / "empty").mkdir()
    assert_usage_error(compare(data=tmp_path / "empty"), "no images in")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    assert_usage_error(compare(weights=tmp_path / "w.pth"), "cannot read weights")
    (tmp_path / "s.json").write_text("{}")
    assert_usage_error(compare(schedule=tmp_path / "s.json"), "s.json")
    same = ["--schedule", tmp_path / "s.json"]
    run("schedule", *MODEL, "--method", "topk", "--keep", "0.5", "--output", tmp_path / "s.json")
    assert_usage_error(run(*compare_args(inputs, tmp_path / "report"), *same, *same), "have the same name")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert_usage_error(compare(labels=tmp_path / "names.txt"), "2 class names were given, the model has 3 classes")
    assert_usage_error(compare(output=image), "--output", "is a file")
    assert_usage_error(compare(output=image / "below"), "cannot write the report")


def test_model_without_a_classifier_is_refused(inputs: Path, tmp_path: Path) -> None:
    state = load_file(inputs / "w.safetensors")
    del state["head.weight"], state["head.bias"]
    save_file(state, tmp_path / "w.safetensors")
    result = run(*compare_args(inputs, tmp_path / "report", weights=tmp_path / "w.safetensors"))
    assert_usage_error(result, "head.weight")


def test_scores_that_are_not_finite_end_the_run(inputs: Path, tmp_path: Path) -> None:
    state = load_file(inputs / "w.safetensors")
    state["head.bias"][1] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    result = run(*compare_args(inputs, tmp_path / "report", weights=tmp_path / "w.safetensors"))
    assert result.exit_code == 1
    assert "dense: scores that are not finite" in result.output
    assert isinstance(result.exception, SystemExit)


def test_method_lists() -> None:
    found = parse_methods("topk, zero_tprune:iters=(3,2,1):start=uniform ,random:seed=7")
    assert list(found) == ["topk", "zero_tprune:iters=(3,2,1):start=uniform", "random:seed=7"]
    chosen = found["zero_tprune:iters=(3,2,1):start=uniform"]
    assert (chosen.iters, chosen.start) == ((3, 2, 1), "uniform")
    assert found["random:seed=7"].seed == 7
    with pytest.raises(click.UsageError, match="unknown method"):
        parse_methods("topk,(")


def test_describe_dense_and_pruned() -> None:
    dense = run("describe", *MODEL)
    assert dense.exit_code == 0
    assert "dense" in dense.output
    pruned = run("describe", *MODEL, "--method", "topk", "--layers", "1,3", "--keep", "12,7")
    assert pruned.exit_code == 0, pruned.output
    assert "17 -> 13" in pruned.output
    assert "13 -> 8" in pruned.output
    for line in ("blocks: ", "with scoring: ", "model, with scoring: "):
        assert line in pruned.output
    only = run("describe", *MODEL, "--method", "dense:class_token_only=true")
    assert only.exit_code == 0, only.output
    assert "dense, pruning nothing, the last block for the class token alone" in only.output


def test_schedule_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    written = run("schedule", *MODEL, "--method", "pomt", "--macs", "0.7", "--layers", "2", "--output", path)
    assert written.exit_code == 0, written.output
    loaded = Schedule.load(path)
    assert (loaded.method, list(loaded.keep)) == ("pomt", [2])
    described = run("describe", *MODEL, "--schedule", path)
    assert described.exit_code == 0, described.output
    assert described.output == run("describe", *MODEL, "--method", "pomt", "--macs", "0.7", "--layers", "2").output


def test_schedule_file_of_dense(tmp_path: Path) -> None:
    written = run("schedule", *MODEL, "--method", "dense:class_token_only=true", "--output", tmp_path / "s.json")
    assert written.exit_code == 0, written.output
    assert "dense, patch tokens kept: all" in " ".join(written.output.split())
    assert (
        "the last block for the class token alone" in run("describe", *MODEL, "--schedule", tmp_path / "s.json").output
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "topk"], "exactly one of keep and macs"),
        (["--method", "topk", "--keep", "0.5", "--macs", "0.5"], "exactly one of keep and macs"),
        (["--method", "topk", "--keep", "some"], "--keep"),
        (["--method", "topk", "--layers", "-1", "--keep", "0.5"], "--layers"),
        (["--method", "topk", "--layers", "99", "--keep", "0.5"], "99"),
        (["--method", "topk", "--macs", "0.01"], "out of reach"),
        (["--method", "dense", "--keep", "0.5"], "dense prunes nothing"),
        (["--keep", "0.5"], "--method"),
        (["--model", "resnet18", "--method", "topk", "--keep", "0.5"], "ResNet is not supported"),
    ],
)
@pytest.mark.parametrize("command", ["describe", "schedule"])
def test_wrong_schedules_are_explained(tmp_path: Path, command: str, args: list[str], said: str) -> None:
    output = ["--output", tmp_path / "s.json"] if command == "schedule" else []
    model = [] if "--model" in args else MODEL
    assert_usage_error(run(command, *model, *args, *output), said)


def test_info_as_table_and_as_json() -> None:
    table = run("info")
    assert table.exit_code == 0
    assert torch.__version__ in table.output
    found = run("info", "--json")
    assert json.loads(found.output)["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not WEIGHTS_PATH.is_file(), reason="the weights of the demo model are not there")
def test_demo_compares_methods(tmp_path: Path, memory_kept: list[str]) -> None:
    result = run("demo", "--images", "10", "--latency-budget", "0", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert {row["method"] for row in report["rows"]} == {None, *METHODS.split(",")}
    assert report["rows"][0]["accuracy"]["top1"] > 0.5
    assert memory_kept
    assert (tmp_path / "report.html").is_file()


def test_help_and_version(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenprune_ext.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # not the sources of a checkout
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("compare", "demo", "describe", "schedule", "info", "visualize"))
    assert run("--version").exit_code == 0
