"""A prediction against a measured profile: files, edges that match, the shape of the curves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from host_models import make_host
from matplotlib.figure import Figure
from profiler.paper_devices import tiny_device

from tokenprune_ext.profiler import BatchProfile
from tokenprune_ext.profiler.edges import Edge
from tokenprune_ext.profiler.fit import Measured, match, read_measured
from tokenprune_ext.profiler.predict import Prediction, predict
from tokenprune_ext.profiler.predict_plots import overlay_figure
from tokenprune_ext.profiler.series import Series
from tokenprune_ext.profiler.steps import Step


@pytest.fixture(scope="module")
def predicted() -> Prediction:
    """With edges at 3, 7, 11 and 15 patches."""
    return predict(make_host("vit"), tiny_device(), layer=0)


def stairs(edges, tokens=range(1, 17)) -> Measured:
    """10 s, and 5 s more above every edge."""
    return Measured(tuple(tokens), tuple(10.0 + 5 * sum(count > edge for edge in edges) for count in tokens))


def test_the_same_staircase(predicted):
    found = match(predicted, Measured(predicted.tokens, tuple(7 * s for s in predicted.latency_s)), tolerance=0)
    assert found.predicted == found.measured == (3, 7, 11, 15)
    assert found.matched == ((3, 3), (7, 7), (11, 11), (15, 15))
    assert (found.precision, found.recall) == (1, 1)
    assert found.correlation == pytest.approx(1)


def test_some_edges_missing_some_moved(predicted):
    found = match(predicted, stairs((4, 9, 15)), tolerance=1)
    assert found.matched == ((3, 4), (15, 15))
    assert (found.precision, found.recall) == (2 / 4, 2 / 3)
    assert 0 < found.correlation < 1
    assert match(predicted, stairs((4, 9, 15)), tolerance=2).matched == ((3, 4), (7, 9), (15, 15))
    assert match(predicted, stairs((4, 9, 15)), tolerance=0).matched == ((15, 15),)


def test_an_edge_is_used_once(predicted):
    """Both 3 and 7 are two tokens from 5; the nearest pair is taken first."""
    assert match(predicted, stairs((5,)), tolerance=2).matched == ((3, 5),)
    assert match(predicted, stairs((6,)), tolerance=4).matched == ((7, 6),)


def test_a_coarse_grid_leaves_the_place_open(predicted):
    """Measured at 2, 6, 10 and 14 only: the edges at 3, 7 and 11 are somewhere between; 15 was never looked at."""
    found = match(predicted, stairs((3, 7, 11, 15), range(2, 17, 4)), tolerance=0, min_fall=1e-9)
    assert found.predicted == (3, 7, 11)
    assert all(measured <= predicted for predicted, measured in found.matched)
    uneven = match(predicted, stairs((7,), (2, 6, 10, 14)), tolerance=0)
    assert (uneven.measured, uneven.matched) == ((6,), ((7, 6),))
    assert (uneven.precision, uneven.recall) == (1 / 3, 1)


def test_nothing_measured_nothing_predicted(predicted):
    flat = match(predicted, stairs(()))
    assert (flat.precision, flat.recall, flat.correlation) == (0, None, None)
    smooth = predict(make_host("vit"), tiny_device(), layer=0, min_fall=0.99)
    found = match(smooth, stairs((7,)))
    assert (found.predicted, found.precision, found.recall) == ((), None, 0)


def test_counts_that_were_not_predicted(predicted):
    with_more = stairs((3, 7, 11, 15), range(1, 40))
    assert match(predicted, with_more).matched == match(predicted, stairs((3, 7, 11, 15))).matched
    with pytest.raises(ValueError, match="has 1 of the predicted token counts"):
        match(predicted, Measured((16, 17), (1.0, 2.0)))


RECORDS = [(5, 0.5), (2, 0.2), (5, 0.3), (5, 0.1)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files(tmp_path: Path, kind):
    if kind == "csv":
        text = "tokens,device,latency_s\n" + "".join(f"{n},cpu,{s}\n" for n, s in RECORDS)
    else:
        text = "\n" + "".join(json.dumps({"latency_s": s, "tokens": n, "round": 1}) + "\n" for n, s in RECORDS)
    path = tmp_path / "profile"
    path.write_text(text)
    assert read_measured(path) == Measured((2, 5), (0.2, 0.3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no records"),
        ("tokens,latency_s\n", "has no records"),
        ("tokens,ms\n3,4\n", "record 1: expected numbers tokens and latency_s"),
        ("tokens,latency_s\n3,1\nfour,1\n", "record 2: expected numbers"),
        ("tokens,latency_s\n3\n", "record 1: expected numbers"),
        ("tokens,latency_s\n0,1\n", "0 tokens in 1.0 s cannot be"),
        ("tokens,latency_s\n3,nan\n", "3 tokens in nan s cannot be"),
        ("tokens,latency_s\n3,-1\n", "cannot be"),
        ('{"tokens": 3}\n', "record 1: expected numbers"),
        ('{"tokens": 3, "latency_s": 1}\nx\n', "is no JSON lines"),
        ('{"tokens": 3, "latency_s": 1}\n[3, 1]\n', "record 2: expected numbers"),
    ],
)
def test_damaged_files(tmp_path: Path, text, said):
    path = tmp_path / "profile"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_measured(path)


def profile_file(tmp_path: Path) -> Path:
    """As `tokenprune profile` writes it, by the class that it has for it."""
    steps = (Step(7, 8, 5.0, 0.5, 9.0), Step(10, 11, -1.0, -0.1, 6.0), Step(14, 15, 0.1, 0.005, 5.0))
    batches = []
    for size in (2, 4):
        tokens = tuple(range(1, 17))
        same = (0.01,) * 16
        median = tuple(size * (10.0 + 5 * (count > 7)) for count in tokens)
        series = Series("model", size, tokens, median, median, median, same, (5,) * 16, 0.01)
        batches.append(BatchProfile(size, series, tokens, steps, "", (), None, 0.03, None, (), None))
    path = tmp_path / "profile.json"
    content = {"settings": {"model": "vit_tiny_patch16_224"}, "batches": [asdict(batch) for batch in batches]}
    path.write_text(json.dumps(content, indent=1))
    return path


def test_the_profile_of_the_profiler(predicted, tmp_path):
    """Its own steps are used, those that fall by enough as tokens are pruned."""
    measured = read_measured(profile_file(tmp_path), 4)
    assert measured.tokens == tuple(range(1, 17))
    assert measured.latency_s == (40.0,) * 7 + (60.0,) * 9
    assert measured.edges == (Edge(7, 8, 5 / 60), Edge(14, 15, 0.1 / 60))
    found = match(predicted, measured)
    assert (found.measured, found.matched) == ((7,), ((7, 7),))
    assert match(predicted, measured, min_fall=0.001).measured == (7, 14)
    with pytest.raises(ValueError, match="has no batch size 1; it has: 2, 4"):
        read_measured(profile_file(tmp_path))
    other = replace(predicted, model="deit_small_patch16_224")
    with pytest.raises(ValueError, match="profile is of vit_tiny_patch16_224, and the prediction of deit_small_p"):
        match(other, measured)


def test_the_figure_shows_all_of_both_curves(predicted, tmp_path, monkeypatch):
    """A machine that had something else to do in between, and edges that are marked where the curve is."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    measured = stairs((7, 11))
    noisy = Measured(measured.tokens, (90.0, *measured.latency_s[1:]))
    overlay_figure(tmp_path / "figure.png", predicted, noisy, match(predicted, measured))
    (panel,) = drawn[0].axes
    assert panel.get_ylim()[0] == 0
    assert panel.get_ylim()[1] > 90 / 20
    assert panel.get_lines()[-1].get_xydata().tolist() == [[7, 10 / 20], [11, 15 / 20]]


def test_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot read"):
        read_measured(tmp_path)
