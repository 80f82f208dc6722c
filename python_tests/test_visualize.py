"""Pictures of a few images: files, their page, and the command."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tokenprune_ext.cli import main
from tokenprune_ext.data import DataError, load_pictures, preprocessing, shown_names
from tokenprune_ext.demo.model import WEIGHTS_PATH
from tokenprune_ext.methods import create
from tokenprune_ext.prune import schedule_of, trace
from tokenprune_ext.report.pictures import take_pictures
from tokenprune_ext.schedule import Schedule
from tokenprune_ext.visualize import prune_variants, visualize, write_page

MODEL = ("--model", "test_vit", "--img-size", "64", "--dpi", "60")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["visualize", *map(str, args)])


def drawn(inputs: Path, output: Path, *args: object) -> Result:
    return run(*MODEL, "--weights", inputs / "w.safetensors", "--output", output, *args)


class Links(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_and_page(inputs: Path, tmp_path: Path) -> None:
    result = drawn(inputs, tmp_path, "--methods", "topk,tome,pomt", "--keep", "0.75", inputs / "one.tsv")
    assert result.exit_code == 0, result.output
    names = {"3-methods.png", "3-scores.png", "3-topk.png", "3-tome.png", "3-pomt.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "index.html"}
    html = (tmp_path / "index.html").read_text("utf-8")
    page = Links(html)
    assert page.open == []
    assert set(page.images) == names
    assert not re.search(r"https?://", html)
    for said in ("test_vit", "3.png", "class 2", "13 at block 1", "--keep 0.75", "layer by layer"):
        assert said in html
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width > 120


def test_a_method_without_scores_has_no_scores_figure(inputs: Path, tmp_path: Path) -> None:
    assert drawn(inputs, tmp_path, "--methods", "tome", inputs / "images" / "1.png").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"1-methods.png", "1-tome.png", "index.html"}


def test_single_panels_and_schedules(inputs: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64)
    Schedule.build(model, "topk", layers=[1, 3], keep=[9, 4]).save(tmp_path / "mine.json")
    images = [inputs / "images" / "1.png"]
    args = ("--schedule", tmp_path / "mine.json", "--methods", "", "--panels", "--columns", 1)
    result = drawn(inputs, tmp_path / "out", *args, *images)
    assert result.exit_code == 0, result.output
    found = {path.name for path in (tmp_path / "out" / "panels").iterdir()}
    assert found == {f"1-mine-block{block}-{kind}.png" for block in (1, 3) for kind in ("kept", "score")}
    with Image.open(tmp_path / "out" / "panels" / "1-mine-block3-kept.png") as panel:
        assert panel.size == (68, 68)  # 4 x 4 patches of 17 pixels, at 60 pixels an inch


def test_files_named_one_by_one_are_all_drawn(inputs: Path, tmp_path: Path) -> None:
    twice = [inputs / "images" / f"{n}.png" for n in (0, 1, 0)]
    assert drawn(inputs, tmp_path / "a", "--methods", "topk", "--limit", 1, *twice).exit_code == 0
    methods = {path.name for path in (tmp_path / "a").glob("*-methods.png")}
    assert methods == {"0-methods.png", "1-methods.png", "0-2-methods.png"}
    assert drawn(inputs, tmp_path / "b", "--methods", "topk", "--limit", 2, inputs / "images").exit_code == 0
    assert len(list((tmp_path / "b").glob("*-methods.png"))) == 2


def test_methods_that_cannot_are_left_out(inputs: Path, tmp_path: Path) -> None:
    result = drawn(inputs, tmp_path, "--methods", "topk,tome", "--macs", "0.5", "--layers", "3", inputs / "one.tsv")
    assert result.exit_code == 2  # neither can at one late layer
    assert "nothing to show: topk left out: macs=0.5 is out of reach" in result.output.replace("\n", " ")
    result = drawn(inputs, tmp_path, "--methods", "topk,dense", inputs / "one.tsv")
    assert result.exit_code == 0
    assert "note: dense left out" in result.output
    assert "dense left out" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give --model and images, or --demo"),
        (["--model", "test_vit"], "give --model and images, or --demo"),
        (["--model", "test_vit", "{images}"], "give either --weights FILE or --pretrained"),
        (["--demo", "{images}"], "--demo brings its own model and images"),
        (["--demo", "--model", "test_vit"], "--demo brings its own model and images"),
        (["--demo", "--pretrained"], "--demo brings its own model and images"),
        (["--demo", "--methods", "best"], "unknown method 'best'"),
        (["--demo", "--methods", "topk", "--keep", "0.5", "--macs", "0.5"], "exactly one of keep and macs"),
        (["--demo", "--methods", "topk", "--layers", "99", "--keep", "0.5"], "layers has 99"),
        (["--demo", "--methods", "topk", "--keep", "1.0"], "nothing to show: topk left out: it prunes nothing"),
        (["--demo", "--methods", ""], "nothing to show: no method and no schedule given"),
        (["--demo", "--dpi", "3"], "--dpi"),
        (["absent.png"], "does not exist"),
    ],
)
@pytest.mark.skipif(not WEIGHTS_PATH.is_file(), reason="the weights of the demo model are not there")
def test_wrong_usage_is_explained(inputs: Path, tmp_path: Path, args: list[str], said: str) -> None:
    result = run("--output", tmp_path / "out", *(arg.format(images=inputs / "images") for arg in args))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = drawn(inputs, tmp_path / "file" / "below", "--methods", "topk", inputs / "one.tsv")
    assert result.exit_code == 2
    assert "cannot write the figures" in result.output


@pytest.mark.skipif(not WEIGHTS_PATH.is_file(), reason="the weights of the demo model are not there")
def test_demo(tmp_path: Path) -> None:
    result = run("--demo", "--limit", 2, "--dpi", 60, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*.png"))) == 2 * 6
    assert len(Links((tmp_path / "index.html").read_text("utf-8")).images) == 2 * 6


def test_what_is_drawn_is_what_was_traced() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=0).eval()  # no classifier
    variants, notes = prune_variants(model, {"peaks": create("peaks")}, {}, macs=0.6)
    assert notes == []
    images = torch.randn(3, 3, 64, 64)
    how: dict[str, Any] = {"class_names": None, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    pictures = take_pictures(model, variants, images, labels=[-1] * 3, names=list("abc"), **how)
    found = trace(variants["peaks"], images)
    for number, picture in enumerate(pictures):
        assert (picture.prediction, picture.label) == (None, None)
        (own,) = picture.progressions
        assert own.prediction is None
        assert [stage.block for stage in own.stages] == list(found.sources)
        for stage in own.stages:
            assert stage.source.flatten().tolist() == found.sources[stage.block][number].tolist()
            assert stage.kept.flatten().tolist() == found.kept[stage.block][number].tolist()
            assert stage.scores is not None
            assert stage.scores.flatten().tolist() == found.scores[stage.block][number].tolist()
            assert stage.tokens == found.counts[stage.block][number]


def test_from_python(tmp_path: Path, inputs: Path) -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=3).eval()
    schedule = Schedule.build(model, "pomt", keep=[7])
    variants, _ = prune_variants(model, {}, {"a b/c": schedule})
    assert schedule_of(variants["a b/c"]) == schedule
    images = load_pictures([inputs / "images"], 3, limit=1, seed=0)
    config, transform = preprocessing(model)
    (figures,) = visualize(
        model,
        variants,
        images,
        ["x y.png"],
        transform,
        tmp_path,
        data_config=config,
        class_names=["ant", "bee", "cat"],
        dpi=60,
    )
    assert (figures.methods, figures.layers) == ("x-y-methods.png", {"a b/c": "x-y-a-b-c.png"})
    assert figures.picture.prediction in ("ant", "bee", "cat")
    page = write_page(tmp_path, [figures], model, variants, "a <command>")
    assert "a &lt;command&gt;" in page.read_text("utf-8")


def test_pictures_of_several_places(inputs: Path) -> None:
    found = load_pictures([inputs / "one.tsv", inputs / "images" / "5.png", inputs / "images"], 3, limit=2, seed=0)
    assert [file.name for file in found.files[:2]] == ["3.png", "5.png"]
    assert found.labels is not None
    assert list(found.labels) == [2, -1, -1, -1]
    assert load_pictures([inputs / "one.tsv"], 0, limit=2, seed=0).labels == (-1,)  # no classifier, no labels
    with pytest.raises(DataError, match="class index 2 is outside"):
        load_pictures([inputs / "one.tsv"], 2, limit=2, seed=0)


def test_names_of_classes() -> None:
    assert shown_names(None, 3) is None
    assert shown_names(["a", "b"], 2) == ("a", "b")
    names = shown_names(None, 1000)
    assert names is not None
    assert (names[1], len(names)) == ("goldfish", 1000)
    assert shown_names([str(i) for i in range(1000)], 1000) == tuple(map(str, range(1000)))
