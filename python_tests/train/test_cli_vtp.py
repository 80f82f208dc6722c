"""`tokenprune train vtp` and `train dynamicvit`: from gates to a smaller model, resumed, and wrong input."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from killed_training import killed_before_model
from killed_training import run_on_files as run
from safetensors.torch import load_file
from toy_training import forked, rows

from tokenprune_ext import checkpoint, schedule_of, vtp
from tokenprune_ext.loading import load_model


def test_from_gates_to_a_smaller_model(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--held-out", inputs / "images.tsv", "--l1", 0.01, "--gate-lr-scale", 100, "--finetune-epochs", 2)
    done = run("vtp", inputs, folder, "--rate", 0.4, "--align", 8, *more)
    assert done.exit_code == 0, done.output
    gated = checkpoint.load(folder / "model.safetensors")
    assert any((gate - 1).abs().max() > 0.01 for gate in vtp.gates_of(gated).values())
    removed = checkpoint.load(folder / "rate-0.4-align-8.safetensors")
    expected = vtp.prune(gated, 0.4, 8)
    for name, value in expected.state_dict().items():
        assert torch.equal(removed.state_dict()[name], value), name
    tuned = checkpoint.load(folder / "rate-0.4-align-8" / "model.safetensors")
    assert vtp.widths_of(tuned) == vtp.widths_of(removed)
    assert not torch.equal(tuned.get_parameter("head.weight"), removed.get_parameter("head.weight"))
    assert [row["epoch"] for row in rows(folder / "rate-0.4-align-8")][-1] == "2"
    first = rows(folder)[0]
    assert float(first["loss"]) == pytest.approx(
        float(first["cross_entropy"]) + 0.01 * float(first["penalty"]), rel=1e-4
    )
    parameters = [sum(value.numel() for value in each.parameters()) / 1e6 for each in (load_model("test_vit"), removed)]
    assert f"-> {parameters[1]:.2f} M parameters" in done.output


def test_another_rate_has_the_same_gates(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run("vtp", inputs, folder, "--rate", 0.4)
    assert first.exit_code == 0, first.output
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.suffix in (".pt", ".csv")}
    again = run("vtp", inputs, folder, "--rate", 0.4)
    assert again.output.count("resumed at step 2 of 2") == 2, again.output
    other = run("vtp", inputs, folder, "--rate", 0.2, "--finetune-epochs", 0)
    assert other.exit_code == 0, other.output
    assert {file: file.read_bytes() for file in before} == before
    assert not (folder / "rate-0.2").exists()
    widths = [vtp.widths_of(checkpoint.load(folder / f"rate-{rate}.safetensors")) for rate in (0.4, 0.2)]
    assert sum(map(sum, widths[0])) < sum(map(sum, widths[1]))


def test_files_are_named_by_what_was_removed(inputs: Path, tmp_path: Path) -> None:
    folder, none = tmp_path / "run", ("--finetune-epochs", 0)
    for more in [
        ("--rate", 0.30000001),
        ("--rate", 0.3),
        ("--rate", 0.3, "--align", "a100"),
        ("--rate", 0.3, "--align", 16),
    ]:
        assert run("vtp", inputs, folder, *more, *none).exit_code == 0
    found = {file.name for file in folder.glob("rate-*")}
    tile = vtp.tile_of("a100")
    names = {"rate-0.30000001", "rate-0.3", f"rate-0.3-align-{tile}", "rate-0.3-align-16"}
    assert found == {f"{name}.safetensors" for name in names}


def test_other_settings_are_refused(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("vtp", inputs, folder, "--rate", 0.4).exit_code == 0
    before = {
        file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix in (".pt", ".csv")
    }
    for more, said in [
        (("--l1", 0.1), "l1 was 0.0001 and is now 0.1"),
        (("--epochs", 3), "epochs was 1 and is now 3"),
        (("--finetune-lr", 1), "lr was 0.0001 and is now 1.0"),
        (("--gate-lr-scale", 2), "gate_lr_scale was 1.0 and is now 2.0"),
    ]:
        done = run("vtp", inputs, folder, "--rate", 0.4, *more)
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split())
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("call", [2, 3, 4])  # before the smaller model, before the fine-tuned one, and after all
def test_killed_between_the_parts(inputs: Path, tmp_path: Path, call: int) -> None:
    """Files of models are written one after the other: gates, smaller, fine-tuned."""
    files = ("model.safetensors", "rate-0.4.safetensors", "rate-0.4/model.safetensors")
    died = forked(killed_before_model, call, "vtp", inputs, tmp_path / "run", "--rate", 0.4)
    assert died == [-signal.SIGKILL if call < 4 else 0]
    assert [(tmp_path / "run" / file).exists() for file in files] == [number < call - 1 for number in range(3)]
    assert run("vtp", inputs, tmp_path / "run", "--rate", 0.4).exit_code == 0
    assert run("vtp", inputs, tmp_path / "whole", "--rate", 0.4).exit_code == 0
    for file in files:
        ours, theirs = (load_file(tmp_path / folder / file) for folder in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_by_latency(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_kept: list[str]) -> None:
    asked = []

    def as_fast(model: torch.nn.Module, share: float, images: torch.Tensor, *, align: int) -> vtp.AsFast:
        assert memory_kept
        asked.append((share, tuple(images.shape), align))
        return vtp.AsFast(vtp.prune(model, 0.5), 0.79, 0.75)

    monkeypatch.setattr(vtp, "prune_to_latency", as_fast)
    for _ in range(2):
        done = run("vtp", inputs, tmp_path / "run", "--by-latency", 0.8, "--latency-batch-size", 3)
        assert done.exit_code == 0, done.output
    assert len(memory_kept) == 1
    assert asked == [(0.8, (3, 3, 64, 64), 1)]  # measured once: a run that goes on keeps what was removed
    assert (tmp_path / "run" / "latency-0.8-batch-3" / "model.safetensors").exists()


def test_dynamicvit(inputs: Path, tmp_path: Path) -> None:
    more = ("--keep", 0.6, "--before", "1,3", "--lr", 1e-3, "--held-out", inputs / "images.tsv")
    done = run("dynamicvit", inputs, tmp_path / "run", *more)
    assert done.exit_code == 0, done.output
    model = checkpoint.load(tmp_path / "run" / "model.safetensors")
    found = schedule_of(model)
    assert found.method == "dynamicvit"
    assert list(found.keep) == [0, 2]
    assert next(iter(found.keep.values())) == int(0.6 * found.num_patches)
    assert {"classification", "ratio", "tokens", "kl", "kept"} <= rows(tmp_path / "run")[0].keys()
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["method"], settings["keep"], settings["before"]) == ("dynamicvit", 0.6, [1, 3])


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        ("vtp", (), "give either --rate or --by-latency"),
        ("vtp", ("--rate", 0.5, "--by-latency", 0.5), "give either --rate or --by-latency"),
        ("vtp", ("--rate", 1), "rate must be in [0, 1), got 1.0"),
        ("vtp", ("--rate", -0.1), "rate must be in [0, 1), got -0.1"),
        ("vtp", ("--rate", 0.999), "have to stay: 1 at each of 24 places; the largest rate is"),
        ("vtp", ("--rate", 0.5, "--align", 0), "align must be"),
        ("vtp", ("--rate", 0.5, "--align", "nothing"), "no device 'nothing'"),
        ("vtp", ("--by-latency", 1.5), "--by-latency must be in (0, 1], got 1.5"),
        ("vtp", ("--rate", 0.5, "--l1", -1), "l1"),
        # Known before the gates are trained, so it is said before.
        ("vtp", ("--rate", 0.5, "--epochs", 2, "--warmup-epochs", 1, "--finetune-epochs", 1), "warmup_epochs"),
        ("dynamicvit", ("--keep", 0), "0.0 is not in the range"),
        ("dynamicvit", ("--before", "3,1"), "before must be block indices, ascending"),
        ("dynamicvit", ("--before", "9"), "before"),
    ],
)
def test_wrong_input(inputs: Path, tmp_path: Path, command: str, args: tuple[object, ...], said: str) -> None:
    done = run(command, inputs, tmp_path / "run", *args)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()


def test_a_device_without_tiles(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "board.json").write_text("{}")
    done = run("vtp", inputs, tmp_path / "run", "--rate", 0.5, "--align", tmp_path / "board.json")
    assert done.exit_code == 2, done.output
    assert "board.json" in done.output
    assert not (tmp_path / "run").exists()
