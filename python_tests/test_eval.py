"""`tokenprune eval`: the same figures on any number of processes, images that cannot be read, wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from tokenprune_ext.cli import main
from tokenprune_ext.distributed import ProcessError, Processes, processes
from tokenprune_ext.schedule import Schedule
from tokenprune_ext.sharded import _shard, own_images

MODEL = ("eval", "--model", "test_vit", "--img-size", "64", "--threads", "1", "--device", "cpu")
BROKEN = 5  # of the images below


@pytest.fixture(scope="module")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images, the one in the middle cut short, and a list of them."""
    folder = tmp_path_factory.mktemp("broken")
    for i in range(9):
        content = (inputs / "images" / f"{min(i, 7)}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(content[: len(content) // 2] if i == BROKEN else content)
    (folder / "list.tsv").write_text("".join(f"{i}.png\t{i % 3}\n" for i in range(9)))
    return folder


def arguments(inputs: Path, data: Path, *more: object, batch: int = 2) -> list[str]:
    given = ("--weights", inputs / "w.safetensors", "--data", data, "--batch-size", batch, "--workers", 0)
    return [str(arg) for arg in (*MODEL, *given, *more)]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def launch(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Under torchrun, which gives every process one thread."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, "-m", "tokenprune_ext", *args],
        capture_output=True,
        text=True,
        cwd=folder,  # not the sources of a checkout
        env={**os.environ, "COLUMNS": "200"},
        timeout=300,
    )


def figures(path: Path) -> dict[str, Any]:
    """All that must not depend on the number of processes."""
    found = json.loads(path.read_text("utf-8"))
    rows = [{key: value for key, value in row.items() if key != "images_per_s"} for row in found["rows"]]
    assert all(row["images_per_s"] > 0 for row in found["rows"])
    return {"rows": rows, **{key: found[key] for key in ("model", "images", "corrupt")}}


@pytest.mark.parametrize("batch", [2, 16])  # of 5 batches one process has a batch more; of 1 it has none
def test_two_processes_find_what_one_finds(inputs: Path, folder: Path, tmp_path: Path, batch: int) -> None:
    args = arguments(
        inputs, folder / "list.tsv", "--method", "topk", "--macs", 0.7, "--on-corrupt", "skip", batch=batch
    )
    one = run(*args, "--json", str(tmp_path / "one.json"))
    assert one.exit_code == 0, one.output
    two = launch(tmp_path, *args, "--json", "two.json", "--workers", str(batch // 16))  # the last one counts
    assert two.returncode == 0, two.stderr
    found = figures(tmp_path / "one.json")
    assert figures(tmp_path / "two.json") == found
    assert [row["name"] for row in found["rows"]] == ["dense", "topk macs=0.7"]
    assert [row["accuracy"]["images"] for row in found["rows"]] == [8, 8]
    assert found["rows"][1]["accuracy"]["kl"] > 0
    assert [Path(image["file"]).name for image in found["corrupt"]] == [f"{BROKEN}.png"]
    assert two.stdout.count("topk macs=0.7") == two.stdout.count("wrote two.json") == 1
    for said in (one.stderr, two.stderr):
        assert said.count("skipped 1 of 9 images that cannot be read") == said.count(f"{BROKEN}.png") == 1


def test_an_image_that_cannot_be_read_ends_the_evaluation(inputs: Path, folder: Path, tmp_path: Path) -> None:
    """Whichever process has it: here the second one, in a batch of its own."""
    args = arguments(inputs, folder / "list.tsv", "--json", str(tmp_path / "no.json"), batch=1)
    one, two = run(*args), launch(tmp_path, *args)
    assert one.exit_code == 2
    assert two.returncode != 0
    for said in (one.output, two.stderr):
        assert f"cannot read image {folder / f'{BROKEN}.png'}" in " ".join(said.split())
    assert not (tmp_path / "no.json").exists()


def test_what_is_wrong_in_all_processes_is_said_once(inputs: Path, tmp_path: Path) -> None:
    two = launch(tmp_path, *arguments(inputs, inputs / "images.tsv", "--method", "topk", "--keep", "0.5,0.5,0.5,0.5"))
    assert two.returncode != 0
    assert two.stderr.count("Usage: tokenprune eval") == 1, two.stderr


@pytest.mark.parametrize(
    ("device", "words"), [("cuda:0", "2 processes cannot share cuda:0"), ("cuda", "more processes .* than its 0 GPUs")]
)
def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=words), processes(device):
        pass


class OtherFails(Processes):
    """The other of two processes could not take the step."""

    def gather(self, value: Any) -> list[Any]:
        values = ["broken there", "broken there"]
        values[self.rank] = value
        return values


def test_what_is_wrong_in_another_process_is_said_by_the_first() -> None:
    first, second = (OtherFails(rank, 2, torch.device("cpu")) for rank in range(2))
    with pytest.raises(ProcessError, match="process 1 of 2: broken there"):
        first.together(lambda: 3)
    with pytest.raises(OSError, match="broken here"):
        first.together(fail)
    for step in (lambda: 3, fail):
        with pytest.raises(SystemExit):
            second.together(step)


def fail() -> int:
    raise OSError("broken here")


def test_without_a_method_the_dense_model_alone(inputs: Path, tmp_path: Path) -> None:
    result = run(*arguments(inputs, inputs / "images.tsv", "--json", str(tmp_path / "found.json")))
    assert result.exit_code == 0, result.output
    (row,) = figures(tmp_path / "found.json")["rows"]
    assert (row["name"], row["method"], row["accuracy"]["kl"], row["accuracy"]["agreement"]) == ("dense", None, 0, 1)
    assert row["accuracy"]["top5"] is None  # of three classes


def test_schedules_and_folders_without_labels(inputs: Path, tmp_path: Path) -> None:
    Schedule.build(timm.create_model("test_vit", img_size=64), "topk", layers=[1], keep=[9]).save(
        tmp_path / "mine.json"
    )
    more = ("--schedule", tmp_path / "mine.json", "--unlabelled", "--json", tmp_path / "found.json", "--limit", 3)
    result = run(*arguments(inputs, inputs / "images", *more))
    assert result.exit_code == 0, result.output
    dense, pruned = figures(tmp_path / "found.json")["rows"]
    assert (pruned["name"], pruned["method"], pruned["schedule"]["keep"]) == ("mine.json", "topk", {"1": 9})
    assert dense["accuracy"]["top1"] is pruned["accuracy"]["top1_change"] is None
    assert pruned["accuracy"]["images"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "topk", "--schedule", "list.tsv"), "give --method or --schedule, not both"),
        (("--macs", "0.5"), "--layers, --keep and --macs need --method"),
        (("--method", "topq"), "topq"),
        (("--method", "topk", "--macs", "0.001"), "macs"),
        (("--schedule", "list.tsv"), "list.tsv"),
        (("--pretrained",), "either --weights FILE or --pretrained"),
        (("--json", "nowhere/found.json"), "cannot write nowhere/found.json: no such folder"),
        (("--device", "cuda:99"), "CUDA devices"),
        (("--on-corrupt", "ignore"), "'ignore' is not one of 'fail', 'skip'"),
        (("--data", "broken.tsv", "--on-corrupt", "skip"), "none of the 1 images can be read"),
    ],
)
def test_wrong_inputs(
    inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "broken.tsv").write_text(f"{BROKEN}.png\t0\n")
    args = arguments(inputs, folder / "list.tsv", *options)
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_models_that_are_not_supported(inputs: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "resnet.safetensors")
    more = ("--weights", tmp_path / "resnet.safetensors", "--data", inputs / "images.tsv", "--device", "cpu")
    result = run("eval", "--model", "test_resnet", *map(str, more))
    assert result.exit_code == 2, result.output
    assert "ResNet" in result.output


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("batch", [1, 4, 50])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_every_image_is_in_one_batch_of_one_process(count: int, batch: int, number: int) -> None:
    group = [Processes(rank, number, torch.device("cpu")) for rank in range(number)]
    shards = [_shard(count, batch, process) for process in group]
    alone = _shard(count, batch, Processes(0, 1, torch.device("cpu")))
    assert sorted(image for shard in shards for part in shard for image in part) == [*range(count)]
    assert all(part in alone for shard in shards for part in shard)
    assert [own_images(count, batch, process) for process in group] == [sum(map(len, shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
