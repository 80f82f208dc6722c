"""Drawing: what a patch looks like, and that panels reach a sheet pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenprune_ext.report.figures import panels, spread, stage_behind
from tokenprune_ext.report.panels import PALE, cell_size, draw_kept, draw_scores, draw_tokens, enlarge
from tokenprune_ext.report.pictures import Picture, Progression, Stage
from tokenprune_ext.report.sheets import Row, draw_sheet

CELL = 24
PIXELS = np.random.default_rng(0).integers(0, 160, (16, 24, 3)).astype(np.uint8)  # 2 x 3 patches of 8 pixels


def inner(panel: np.ndarray, row: int, column: int) -> np.ndarray:
    """A patch of a panel without its border."""
    return panel[row * CELL + 3 : (row + 1) * CELL - 3, column * CELL + 3 : (column + 1) * CELL - 3]


def across(panel: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels on both sides of the border between a patch and the next in its row."""
    middle, edge = row * CELL + CELL // 2, (column + 1) * CELL
    return panel[middle, edge - 1 : edge + 1]


def test_cells_are_whole_pixels() -> None:
    assert cell_size((14, 14), 336) == 24
    assert cell_size((10, 37), 336) == 9
    assert cell_size((500, 500), 336) == 2
    assert enlarge(PIXELS, (2, 3), CELL).shape == (48, 72, 3)


def test_kept_patches_are_as_they_were_and_others_pale() -> None:
    kept = np.array([[True, False, True], [True, True, False]])
    panel, image = draw_kept(PIXELS, kept, CELL), enlarge(PIXELS, (2, 3), CELL)
    for row in range(2):
        for column in range(3):
            shown = inner(panel, row, column)
            if kept[row, column]:
                assert (shown == inner(image, row, column)).all()
            else:
                assert shown.mean() > 0.8 * PALE
                assert (shown == shown[..., :1]).all()  # grey
    assert (across(panel, 0, 0)[1] == 168).all()  # a line between them
    assert (panel == draw_kept(PIXELS, kept, CELL)).all()
    assert (draw_kept(PIXELS, np.ones((2, 3), bool), CELL) == image).all()


def test_merged_patches_have_their_mean_colour_inside_a_white_line() -> None:
    source = np.array([[0, 0, 1], [2, 3, 3]])
    panel, image = draw_tokens(PIXELS, source, CELL), enlarge(PIXELS, (2, 3), CELL)
    for row, column in ((0, 2), (1, 0)):
        assert (inner(panel, row, column) == inner(image, row, column)).all()
    mean = image[:CELL, : 2 * CELL].reshape(-1, 3).mean(0).round()
    for column in (0, 1):
        assert (inner(panel, 0, column) == mean).all()
    assert (across(panel, 0, 0) == mean).all()  # no line inside a group
    assert (across(panel, 0, 1) == 255).all()
    assert (across(panel, 1, 0) == 255).all()
    assert (panel[CELL - 1 : CELL + 1, CELL // 2] == 255).all()


def test_tokens_of_their_own_have_no_lines() -> None:
    source = np.arange(6).reshape(2, 3)
    assert (draw_tokens(PIXELS, source, CELL) == enlarge(PIXELS, (2, 3), CELL)).all()


def test_dropped_patches_are_pale_and_never_a_group() -> None:
    panel = draw_tokens(PIXELS, np.array([[0, -1, -1], [1, 1, -1]]), CELL)
    for row, column in ((0, 1), (0, 2), (1, 2)):
        assert inner(panel, row, column).mean() > 0.8 * PALE
    assert inner(panel, 0, 1).std() > 0  # the image is still to be guessed


def test_a_line_in_a_bright_image_is_grey() -> None:
    panel = draw_tokens(np.full_like(PIXELS, 250), np.array([[0, 0, 1], [0, 0, 1]]), CELL)
    assert (across(panel, 0, 1) == 168).all()


def test_scores_are_coloured_by_rank() -> None:
    scores = np.array([[0.1, 5.0, np.nan], [0.2, 5.0, 0.3]])
    panel = draw_scores(scores, CELL)
    colour = {place: tuple(map(int, inner(panel, *place)[0, 0])) for place in np.ndindex(2, 3)}
    assert colour[0, 0] == (68, 1, 84)  # the ends of viridis
    assert colour[0, 1] == colour[1, 1] == (253, 231, 37)
    assert colour[0, 2] == (PALE,) * 3
    assert sum(colour[0, 0]) < sum(colour[1, 0]) < sum(colour[1, 2]) < sum(colour[0, 1])
    assert (panel == draw_scores(np.exp(3 * scores), CELL)).all()  # the order alone counts
    assert draw_scores(np.full((2, 3), np.nan), CELL).min() == PALE
    assert (panel[:CELL, CELL - 1] == colour[0, 0]).all()  # up to the very border


def where(whole: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Every place at which one image holds another, bit for bit."""
    height, width = part.shape[:2]
    places = np.argwhere((whole[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return [(y, x) for y, x in places if (whole[y : y + height, x : x + width] == part).all()]


@pytest.mark.parametrize("dpi", [72, 110, 300])
def test_panels_reach_a_sheet_pixel_by_pixel(tmp_path: Path, dpi: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (6, 50, 70, 3)).astype(np.uint8)
    rows = [Row("one:a=1", noise[1:3], ("4 tokens", "2 tokens")), Row("two", [None, noise[3]], ("", "x"))]
    draw_sheet(tmp_path / "sheet.png", dpi, noise[0], ["block 3", "block 6\ntwo"], rows, ("dropped", "merged", "score"))
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB"))
        assert round(image.info["dpi"][0]) == dpi
    places = [where(sheet, panel) for panel in noise[:4]]
    assert [len(found) for found in places] == [1, 1, 1, 1]
    (_, x0), (y1, x1), (y2, x2), (y3, x3) = (found[0] for found in places)
    assert y1 == y2 < y3
    assert x0 + 70 < x1
    assert x2 == x3
    assert x2 - x1 - 70 == round(5 * dpi / 72)  # the gap
    assert (sheet[0] == 255).all()
    assert (sheet[:, 0] == 255).all()
    assert not where(sheet, noise[4])


def test_at_most_so_many_evenly_spread_with_the_last() -> None:
    assert spread(range(12), 4) == [2, 5, 8, 11]
    assert spread([3, 6, 9], 4) == [3, 6, 9]
    assert spread(range(8), 3) == [1, 4, 7]
    assert spread([], 4) == []


def test_behind_a_block_is_the_latest_layer() -> None:
    stages = tuple(Stage(block, np.array([[0, -1]]), np.array([[True, False]])) for block in (3, 6))
    own = Progression("m", None, stages)
    assert stage_behind(own, 2).tokens == 2
    assert [stage_behind(own, block).block for block in (2, 3, 5, 6, 11)] == [-1, 3, 3, 6, 6]


def test_panels_of_a_stage() -> None:
    source, kept = np.array([[0, 0, 1], [2, -1, 3]]), np.array([[True, False, True], [True, False, True]])
    plain = Stage(1, np.arange(6).reshape(2, 3), np.ones((2, 3), bool))
    picture = Picture("p", None, None, PIXELS, (Progression("m", None, (plain,)),))
    assert list(panels(picture, plain, 300)) == ["kept"]
    drawn = panels(picture, Stage(1, source, kept, np.ones((2, 3))), 300)
    assert list(drawn) == ["kept", "merged", "score"]
    assert {panel.shape for panel in drawn.values()} == {(2 * 112, 3 * 112, 3)}
