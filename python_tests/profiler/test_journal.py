"""The record of a measurement: nothing is lost, nothing foreign is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenprune_ext.profiler import Journal, ProfileError
from tokenprune_ext.profiler.points import MODEL, Point

POINT = Point(MODEL, 2, 5)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "profile.jsonl"
    with Journal(path) as journal:
        journal.begin("settings", {"stride": 1, "batch_sizes": (1, 2)})
        journal.add_visit(POINT, 0, [0.5, 0.25])
        journal.add_accuracy(5, {"value": 0.75})
    return path


def test_what_was_written_is_read_again(written: Path) -> None:
    before = written.read_bytes()
    with Journal(written) as journal:
        journal.begin("settings", {"stride": 1, "batch_sizes": (1, 2)})
        assert journal.visits == {(POINT, 0): (0.5, 0.25)}
        assert journal.accuracy == {5: {"value": 0.75}}
    assert written.read_bytes() == before
    first, *rest = [json.loads(line) for line in before.decode().splitlines()]
    assert first == {"tokenprune profile": 1}
    assert rest[0]["section"] == "settings"


def test_a_visit_is_in_the_file_as_soon_as_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    with Journal(path) as journal:
        journal.add_visit(POINT, 0, [0.5])
        assert json.loads(path.read_text().splitlines()[-1])["times_s"] == [0.5]


def test_other_settings_are_named_and_nothing_is_overwritten(written: Path) -> None:
    before = written.read_bytes()
    with Journal(written) as journal, pytest.raises(ProfileError) as error:
        journal.begin("settings", {"stride": 4, "batch_sizes": (1, 2), "new": True})
    assert "stride: 1 there, 4 now; new: None there, True now" in str(error.value)
    assert "batch_sizes" not in str(error.value)
    assert str(written) in str(error.value)
    assert written.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_cut_off(written: Path, cut: int) -> None:
    content = written.read_bytes()
    written.write_bytes(content[:-cut])
    with Journal(written) as journal:
        assert journal.visits == {(POINT, 0): (0.5, 0.25)}
        assert journal.accuracy == {}
        journal.add_accuracy(6, {"value": 0.5})
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert lines[-1] == {"accuracy": {"value": 0.5}, "tokens": 6}
    assert len(lines) == 4


def test_a_torn_first_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    path.write_text('{"tokenprune')
    with Journal(path) as journal:
        journal.begin("settings", {})
    assert json.loads(path.read_text().splitlines()[0]) == {"tokenprune profile": 1}


@pytest.mark.parametrize("content", ["hello", "hello\n", "{}\n", '{"tokenprune profile": 2}\n'])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.jsonl"
    path.write_text(content)
    with pytest.raises(ProfileError, match="is no profile: its first line is not"):
        Journal(path)
    assert path.read_text() == content


@pytest.mark.parametrize("damage", ["no json", '{"other": 1}', '{"point": [1, 2], "round": 0, "times_s": []}'])
def test_a_damaged_line_is_named(written: Path, damage: str) -> None:
    lines = written.read_text().splitlines()
    written.write_text("\n".join([*lines[:2], damage, *lines[2:], ""]))
    before = written.read_bytes()
    with pytest.raises(ProfileError, match="line 3 is damaged"):
        Journal(written)
    assert written.read_bytes() == before


def test_one_run_writes_at_a_time(written: Path) -> None:
    with Journal(written), pytest.raises(ProfileError, match="is being written by another run"):
        Journal(written)
    Journal(written).close()


RUN = """
import sys, time
from tokenprune_ext.profiler import Journal
from tokenprune_ext.profiler.points import MODEL, points_of
from tokenprune_ext.profiler.sweep import Plan, sweep

class Slow:
    def prepare(self, point):
        return lambda: point.tokens * 1e-3
    def clock(self, call):
        time.sleep(0.002)
        return call()

with Journal(sys.argv[1]) as journal:
    journal.begin("settings", {"stride": 1})
    print("ready", flush=True)
    sweep(Slow(), journal, points_of((MODEL,), (1,), range(1, 31)), Plan(3, 1e-9, 1.0, 0))
"""


def test_a_killed_run_continues_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    command = [sys.executable, "-c", RUN, str(path)]
    # -c puts the working directory first: the package under test must be the one that this process has
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        while path.read_bytes().count(b"\n") < 22:  # 20 visits
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    done = kept.count(b"\n")
    assert 22 <= done < 2 + 90
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    with Journal(path) as journal:
        assert len(journal.visits) == 90
        assert all(times == (point.tokens * 1e-3,) * 3 for (point, _), times in journal.visits.items())
    assert path.read_bytes().count(b"\n") == 2 + 90  # no visit twice
