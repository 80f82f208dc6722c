"""`tokenprune search` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tokenprune_ext import Schedule
from tokenprune_ext.cli import main

pytest.importorskip("optuna")


def run(inputs: Path, output: Path, *args: object, weights: bool = True) -> Result:
    command = ["search", "--model", "test_vit", "--img-size", "64", "--data", inputs / "images.tsv"]
    command += ["--weights", inputs / "w.safetensors"] if weights else []
    command += ["--trials", "7", "--batch-size", "2", "--output", output]
    return CliRunner().invoke(main, [*map(str, command), *map(str, args)])


def test_writes_schedules_that_every_command_takes(inputs, tmp_path):
    how = ("--method", "topk", "--tune", "reduction=drop|merge", "--budget-macs=-20%", "--budget-macs", "0.7")
    result = run(inputs, tmp_path, *how)
    assert result.exit_code == 0, result.output
    assert "wrote" in result.output
    found = json.loads((tmp_path / "search.json").read_text())
    assert [best["budget"] for best in found["best"]] == [0.8, 0.7]
    assert found["trials"] == {"0.8": 7, "0.7": 7}
    for best in found["best"]:
        assert best["held_out"]["images"] == 4
        path = tmp_path / f"schedule-{best['budget']:g}.json"
        schedule = Schedule.load(path)
        assert {str(layer): count for layer, count in schedule.keep.items()} == best["schedule"]["keep"]
        assert schedule.origin["command"].startswith("tokenprune search --model test_vit")
        shown = CliRunner().invoke(
            main, ["describe", "--model", "test_vit", "--img-size", "64", "--schedule", str(path)]
        )
        assert shown.exit_code == 0, shown.output
        assert "topk, pruning at blocks" in shown.output
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.width > 900
    assert "searched" in result.output
    assert "uniform at" in result.output
    again = run(inputs, tmp_path, *how)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "search.json").read_text())["best"][0]["kl"] == found["best"][0]["kl"]
    other = run(inputs, tmp_path, *how, "--seed", "1")
    assert other.exit_code == 1
    assert "trials.db holds a search with seed 0, not 1" in other.output


def test_without_labels_and_without_holdout(inputs, tmp_path):
    result = run(inputs, tmp_path, "--method", "topk", "--budget-macs", "0.8", "--unlabelled", "--holdout", "0")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "search.json").read_text())["best"][0]["held_out"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --budget-macs or --budget-latency"),
        (["--budget-macs", "-35"], "'-35' leaves -35 of the dense model: expected a share in (0, 1]"),
        (["--budget-macs=-100%"], "'-100%' leaves 0 of the dense model"),
        (["--budget-macs", "a third"], "'a third': expected a share like 0.65 or a saving like -35%"),
        (["--budget-macs", "0.8", "--method", "dense"], "dense prunes nothing"),
        (["--budget-macs", "0.8", "--tune", "tau"], "--tune 'tau': expected option=value|value"),
        (["--budget-macs", "0.8", "--tune", "rate=1|2"], "method 'peaks' has no option rate"),
        (["--budget-macs", "0.8", "--layers", "40"], "layers has 40"),
        (["--budget-macs", "0.8", "--limit", "2", "--holdout", "0.99"], "leaves none of the 2 images to search on"),
        (["--budget-macs", "0.05", "--method", "tome"], "budgets has 0.05, which tome did not reach"),
    ],
)
def test_wrong_usage_is_explained(inputs, tmp_path, args, message):
    result = run(inputs, tmp_path / "out", *args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_weights_are_needed(inputs, tmp_path):
    result = run(inputs, tmp_path, "--budget-macs", "0.8", weights=False)
    assert result.exit_code == 2
    assert "give either --weights FILE or --pretrained" in result.output
