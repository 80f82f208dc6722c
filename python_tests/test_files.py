"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tokenprune_ext.files import replacing


def test_a_file_and_what_belongs_to_it_take_their_places(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with replacing(target) as file:
        assert file.name == target.name
        file.write_text("new")
        (file.parent / "model.onnx.data").write_text("weights")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text() == "weights"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as file:
            file.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "model") as file:
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027  # it is as it was
    finally:
        os.umask(before)
