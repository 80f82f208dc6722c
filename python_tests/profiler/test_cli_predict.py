"""`tokenprune predict`: what it prints and writes, and an explanation for every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tokenprune_ext.cli import main
from tokenprune_ext.profiler.device import load_device
from tokenprune_ext.profiler.predict import Prediction, predict

MODEL = ("--model", "deit_tiny_patch16_224")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["predict", *(str(arg) for arg in args)])


def said(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def tx2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run."""
    folder = tmp_path_factory.mktemp("predict") / "deep" / "out"
    result = run(*MODEL, "--on", "TX2", "--batch-sizes", "1,2", "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, said(result)


def test_json_has_the_predictions(tx2):
    import timm

    content = json.loads((tx2[0] / "predictions.json").read_text())
    assert content.keys() == {"predictions"}
    model = timm.create_model("deit_tiny_patch16_224")
    for size, found in zip((1, 2), content["predictions"], strict=True):
        assert Prediction.from_json(found) == predict(model, load_device("tx2"), batch_size=size)


def test_the_table_has_every_edge_and_says_that_nothing_is_measured(tx2):
    folder, output = tx2
    assert "predicted on paper from a description of the device, not measured" in output
    assert "deit_tiny_patch16_224 on Jetson TX2, float16, batch 2: predicted edges, pruning at block 3" in output
    for found in json.loads((folder / "predictions.json").read_text())["predictions"]:
        assert found["edges"]
        for edge in found["edges"]:
            assert f"{edge['tokens']} {edge['tokens'] + 1} {196 - edge['tokens']}" in output


def test_the_figure_is_a_panel_a_batch_size(tx2, tmp_path):
    single = tmp_path / "one"
    assert run(*MODEL, "--on", "tx2", "--batch-sizes", "1", "--output", single).exit_code == 0
    sizes = []
    for path in (single, tx2[0]):
        with Image.open(path / "predictions.png") as image:
            assert image.getextrema()[0][0] < 255  # something is drawn
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_a_device_of_ones_own_and_a_measured_profile(tx2, tmp_path):
    device = tmp_path / "mine.json"
    device.write_text('{"like": "tx2", "name": "mine", "clock_hz": 1e9}')
    known = json.loads((tx2[0] / "predictions.json").read_text())["predictions"][0]
    profile = tmp_path / "profile.csv"
    rows = zip(known["tokens"], known["latency_s"], strict=True)
    profile.write_text("tokens,latency_s\n" + "".join(f"{n},{3 * s}\n" for n, s in rows if n % 2))
    options = ("--batch-sizes", 1, "--measured", profile, "--output", tmp_path)
    result = run(*MODEL, "--on", device, *options)
    assert result.exit_code == 0, result.output
    assert "on mine, float16, batch 1" in said(result)
    found = json.loads((tmp_path / "predictions.json").read_text())["match"]
    assert (found["precision"], found["recall"]) == (1, 1)
    assert f"predicted edges: {found['predicted']}, measured: {found['measured']}; precision 1.00" in said(result)
    assert (tmp_path / "predictions.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--on", "v100"), "no device 'v100' and no such file; devices: a100"),
        (("--on", "tx2", "--dtype", "bfloat16"), "Jetson TX2 has no rate for bfloat16"),
        (("--on", "tx2", "--layer", 12), "layer must be one of the 12 blocks"),
        (("--on", "tx2", "--batch-sizes", "1,x"), "expected whole numbers from 1 on, like 1,2,4"),
        (("--on", "tx2", "--batch-sizes", "0"), "expected whole numbers"),
        (("--on", "tx2", "--model", "resnet18"), "is not supported"),
        (("--on", "tx2", "--model", "nothing"), "timm has no model 'nothing'"),
        (("--on", "tx2", "--measured", __file__), "--measured is compared with one batch size"),
        (("--on", "tx2", "--batch-sizes", "1", "--measured", __file__), "record 1: expected numbers"),
        (("--on", "tx2", "--output", "/proc/none"), "cannot write the prediction"),
        ((), "Missing option '--on'"),
    ],
)
def test_wrong_input_is_explained(args, words):
    result = run(*MODEL, *args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert words in said(result)


def test_tables_of_the_documentation(bench: Path):
    """docs/predict.md has what `python bench/predicted_edges.py` writes."""
    import predicted_edges

    text = predicted_edges.DOCS.read_text("utf-8")
    _, _, rest = text.partition(predicted_edges.BEGIN)
    assert rest.partition(predicted_edges.END)[0].strip() == predicted_edges.tables().strip()


def test_the_command_of_the_tables(bench: Path, tmp_path: Path):
    import predicted_edges

    copy = tmp_path / "predict.md"
    text = predicted_edges.DOCS.read_text("utf-8")
    copy.write_text(text.replace("| DeiT-S | TX2 | 1 |", "| stale |"))
    assert CliRunner().invoke(predicted_edges.main, ["--output", str(copy)]).exit_code == 0
    assert copy.read_text("utf-8") == text
    copy.write_text("no place")
    assert CliRunner().invoke(predicted_edges.main, ["--output", str(copy)]).exit_code == 1
