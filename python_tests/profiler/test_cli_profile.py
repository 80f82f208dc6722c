"""`tokenprune profile`: a whole run, what every command does with its schedule, and an explanation for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tokenprune_ext.cli import main

MODEL = ("--model", "test_vit", "--img-size", "64")  # 16 patch tokens
QUICK = (
    "--device",
    "cpu",
    "--threads",
    "1",
    "--rounds",
    "3",
    "--visit-seconds",
    "1e-9",
    "--stride",
    "4",
    "--layer",
    "1",
)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def profiled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, tuple[object, ...]]:
    output = tmp_path_factory.mktemp("profile")
    data = ("--weights", inputs / "w.safetensors", "--data", inputs / "images.tsv", "--eval-batch-size", 4)
    args = ("profile", *MODEL, *QUICK, *data, "--batch-sizes", "1,2", "--accuracy-stride", 8, "--output", output)
    return run(*args, "--verify"), output, args


def test_a_run_writes_everything(profiled: tuple[Result, Path, tuple[object, ...]]) -> None:
    result, output, _ = profiled
    assert result.exit_code == 0, result.output
    assert "no steps beyond the noise" in result.output
    assert "batch 2: checked in turns with dense" in result.output
    for name in ("profile.jsonl", "profile.json", "report.html", "schedule_b1.json", "staircase_b2.png"):
        assert f"wrote {output / name}" in result.output or name == "profile.jsonl"
        assert (output / name).stat().st_size > 0
    content = json.loads((output / "profile.json").read_text())
    assert content["command"].startswith("tokenprune profile --model test_vit")
    assert content["batches"][0]["series"]["tokens"] == [2, 4, 8, 12, 16]
    assert content["batches"][0]["schedule"]["origin"]["command"] == content["command"]


def test_its_schedule_goes_into_every_command(
    profiled: tuple[Result, Path, tuple[object, ...]], inputs: Path, tmp_path: Path
) -> None:
    schedule = ("--schedule", profiled[1] / "schedule_b1.json")
    assert run("describe", *MODEL, *schedule).exit_code == 0
    weights = ("--weights", inputs / "w.safetensors")
    compared = run(
        "compare", *MODEL, *weights, "--data", inputs / "images.tsv", "--methods", "", *schedule, "--no-latency",
        "--workers", 0, "--output", tmp_path,
    )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    assert "schedule_b1" in compared.output


def test_a_second_run_measures_nothing_again(profiled: tuple[Result, Path, tuple[object, ...]]) -> None:
    _, output, args = profiled
    before = (output / "profile.jsonl").read_bytes()
    again = run(*args, "--alpha", 0)
    assert again.exit_code == 0, again.output
    assert (output / "profile.jsonl").read_bytes() == before
    assert json.loads((output / "schedule_b1.json").read_text())["origin"]["alpha"] == 0


def test_without_images_there_is_a_profile_and_no_r(tmp_path: Path, memory_kept: list[str]) -> None:
    result = run("profile", *MODEL, *QUICK, "--no-blocks", "--mode", "paper", "--coarse", 8, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no images were given" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile.jsonl", "profile.json", "report.html", "staircase_b1.png",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "Random tokens removed at the first layer" in page
    series = json.loads((tmp_path / "profile.json").read_text())["batches"][0]["series"]
    skipped = sorted({2, 4, 8, 12, 16} - set(series["tokens"]))  # which ones depends on what was measured
    assert (f"Not measured: {', '.join(map(str, skipped))}" in page) == bool(skipped)


def test_a_prediction_is_drawn_over_the_profile(tmp_path: Path) -> None:
    how = (*MODEL, "--on", "orin", "--batch-sizes", "1", "--layer", "1", "--output", tmp_path)
    assert run("predict", *how).exit_code == 0
    own = ("profile", *MODEL, *QUICK, "--no-blocks", "--output", tmp_path / "profile")
    assert run(*own).exit_code == 0
    alone = (tmp_path / "profile" / "staircase_b1.png").read_bytes()
    both = run(*own, "--predicted", tmp_path / "predictions.json")
    assert both.exit_code == 0, both.output
    assert (tmp_path / "profile" / "staircase_b1.png").read_bytes() != alone
    wrong = run(*own, "--predicted", tmp_path / "profile" / "profile.json")
    assert wrong.exit_code == 2
    assert "is no predictions.json" in " ".join(wrong.output.split())


def test_other_settings_are_refused(profiled: tuple[Result, Path, tuple[object, ...]]) -> None:
    _, output, args = profiled
    before = {path: path.read_bytes() for path in output.iterdir()}
    result = run(*args, "--stride", 2)
    assert result.exit_code == 2
    assert "other settings: stride: 4 there, 2 now" in " ".join(result.output.split())
    assert {path: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--data", "DATA"), "--data needs --weights FILE or --pretrained"),
        (("--verify",), "--verify needs --data"),
        (("--batch-sizes", "1,x"), "expected whole numbers from 1 on, like 1,2,4"),
        (("--batch-sizes", "2,2"), "batch_sizes must be at least one size, each once"),
        (("--cuda-graph",), "cuda_graph needs a CUDA device, and the model is on cpu"),
        (("--alpha", "2"), "is not in the range 0"),
        (("--method", "evit:bad=1"), "method 'evit' has no option bad"),
        (("--layer", "9"), "layer must be at most 5"),
        (("--min-tokens", "16"), "min_tokens must be at most 15"),
        (("--device", "cuda:99"), "CUDA devices"),
        (("--pretrained", "--weights", "DATA"), "give --weights FILE or --pretrained, not both"),
    ],
)
def test_wrong_input_is_explained(inputs: Path, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    given = [inputs / "images.tsv" if arg == "DATA" else arg for arg in args]
    result = run("profile", *MODEL, *QUICK, *given, "--output", tmp_path)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
