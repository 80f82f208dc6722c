"""The report: states of patches, pictures, plots, table, and an HTML file that needs no other."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tokenprune_ext.compare import Comparison, Macs, Row
from tokenprune_ext.evaluate import Accuracy
from tokenprune_ext.latency import Latency
from tokenprune_ext.report import plots, render_html, write_report
from tokenprune_ext.report.pictures import Picture, Progression, Stage
from tokenprune_ext.report.table import COLUMNS, print_table


def make_row(name: str, method: str | None, fraction: float, *, labelled: bool = True, timed: bool = True) -> Row:
    accuracy = Accuracy(200, 0.75 * fraction, 0.75 * fraction - 0.75, 0.0123, 0.5 + fraction / 2, 0.5, 0.01)
    if not labelled:
        accuracy = dataclasses.replace(accuracy, top1=None, top1_change=None, top1_change_se=None)
    latency = Latency(fraction / 10, fraction / 11, fraction / 9, 320 / fraction, 1 / fraction, 1.0, 2.0, (0.1, 0.2))
    macs = Macs(int(1e9 * fraction), fraction, int(2e7), fraction + 0.02, int(1.1e9 * fraction), fraction)
    return Row(name, method, None, None, macs, accuracy, latency if timed else None, 12_300_000)


def make_comparison(**options: bool) -> Comparison:
    rows = (
        make_row("dense", None, 1.0, **options),
        make_row("topk 80 %", "topk", 0.8, **options),
        make_row("topk 60 %", "topk", 0.6, **options),
        make_row("pomt 80 %", "pomt", 0.8, **options),
    )
    stage = Stage(2, np.array([[0, -1], [1, 1]]), np.array([[True, False], [False, True]]))
    picture = Picture(
        name="<img>.png",
        label="class 3" if options.get("labelled", True) else None,
        prediction="class 4",
        pixels=np.full((8, 8, 3), 200, dtype=np.uint8),
        progressions=(Progression("topk 60 %", "class 3", (stage,)),),
    )
    preprocessing = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}
    timed = options.get("timed", True)
    settings = {"images": 200, "batch_size": 32, "dtype": "float32", "preprocessing": preprocessing}
    settings["latency_budget_s"] = 3.0 if timed else None
    environment = {"device": "A <CPU>", "device_type": "cpu", "threads": 2, "created": "2030-01-02T03:04:05+00:00"}
    environment["versions"] = {"tokenprune": "1.2.3", "torch": "2.15.0", "timm": "1.0.31"}
    return Comparison("vit_small", settings, environment, rows, ("a note",), (picture,))


def test_counts_of_a_stage() -> None:
    stage = make_comparison().pictures[0].progressions[0].stages[0]
    assert stage.counts == {"kept": 1, "merged": 2, "dropped": 1}
    assert stage.tokens == 2


def test_table_shows_every_figure() -> None:
    text = {column.heading: [column.text(row) for row in make_comparison().rows] for column in COLUMNS}
    assert text["variant"][1] == "topk 80 %"
    assert text["MACs blocks, G"][1] == "0.800 (80.0 %)"
    assert text["with scoring, G"][1] == "0.820 (82.0 %)"
    assert text["MACs model, G"][1] == "0.880 (80.0 %)"
    assert text["top-1, %"][:2] == ["75.00", "60.00"]
    assert text["change, points"][:2] == ["-", "-15.00 ± 1.23"]
    assert text["agreement, %"][1] == "90.00"
    assert text["latency, ms"][1] == "80.0 (72.7–88.9)"
    assert text["images/s"][1] == "400.0"
    assert text["speed-up"][1] == "1.25x"
    assert text["peak, MB"][1] == "12.3"


def test_what_was_not_measured_is_a_dash() -> None:
    row = make_comparison(labelled=False, timed=False).rows[1]
    dashes = {column.heading for column in COLUMNS if column.text(row) == "-"}
    assert dashes == {"top-1, %", "change, points", "latency, ms", "images/s", "speed-up"}


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (100, 2), (60, 4)])
def test_narrow_terminals_get_several_tables(width: int, tables: int) -> None:
    buffer = io.StringIO()
    print_table(Console(file=buffer, width=width), make_comparison().rows, "title")
    text = buffer.getvalue()
    assert text.count("topk 80 %") == tables
    assert "…" not in text
    assert all(column.heading in text for column in COLUMNS)


def decode(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


@pytest.mark.parametrize("labelled", [True, False])
def test_plots_are_svg_with_a_line_per_method(labelled: bool) -> None:
    rows = make_comparison(labelled=labelled).rows
    for uri in (plots.plot_macs(rows), plots.plot_speedup(rows)):
        assert uri is not None
        root = ElementTree.fromstring(decode(uri))
        assert root.tag.endswith("svg")
        text = decode(uri).decode()
        # Text is drawn as outlines; matplotlib keeps it readable in comments.
        for word in ("dense", "topk", "pomt", "top-1, %" if labelled else "agreement with dense, %"):
            assert f"<!-- {word} -->" in text
    assert plots.plot_speedup(make_comparison(timed=False).rows) is None


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "td":
            self.cells.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_html_is_whole_and_needs_no_other_file() -> None:
    comparison = make_comparison()
    html = render_html(comparison, "tokenprune compare --data 'a & b'")
    page = Page(html)
    assert page.open == []
    assert all(link.startswith("data:image/") for link in page.links)
    assert len(page.links) == 4  # two plots, the image, one stage
    assert not re.search(r"(https?:)?//(?!www\.w3\.org)[a-z]", re.sub(r'"data:[^"]*"', "", html))
    assert page.cells == [column.text(row) for row in comparison.rows for column in COLUMNS]
    with Image.open(io.BytesIO(decode(page.links[3]))) as stage:
        assert stage.format == "JPEG"
        assert stage.size == (280, 280)
    for shown in ("a note", "A &lt;CPU&gt;", "&lt;img&gt;.png", "&#39;a &amp; b&#39;", "1 kept, 2 merged, 1 dropped"):
        assert shown in html
    assert "<img>.png" not in html


def test_html_without_labels_latency_and_pictures() -> None:
    comparison = dataclasses.replace(make_comparison(labelled=False, timed=False), pictures=())
    html = render_html(comparison, "command")
    assert len(Page(html).links) == 1
    assert "Which patches are kept" not in html
    assert "Agreement against cost" in html


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    for _ in range(2):
        json_path, html_path = write_report(make_comparison(), folder, "tokenprune compare")
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html"}
    figures = json.loads(json_path.read_text("utf-8"))
    assert figures["command"] == "tokenprune compare"
    assert [row["name"] for row in figures["rows"]] == ["dense", "topk 80 %", "topk 60 %", "pomt 80 %"]
    assert figures["rows"][1]["latency"]["rounds_s"] == [0.1, 0.2]
    assert html_path.read_text("utf-8").startswith("<!doctype html>")
