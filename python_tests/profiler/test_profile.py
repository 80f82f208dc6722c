"""Whole profiles on pretended devices: the steps, the choice, the schedule, the report; and real calls on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from profiler.pretend import Curve, Device, flat, slope, staircase
from torch import Tensor, nn

import tokenprune_ext as tokenprune
from tokenprune_ext.profiler import BlockTable, Journal, Profile, ProfileError, Settings, block_latency, profile
from tokenprune_ext.profiler.report import write_profile
from tokenprune_ext.profiler.verify import verify

QUICK = {"rounds": 3, "visit_s": 1e-9}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=224, num_classes=3).eval()  # 196 patch tokens, 6 blocks


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 224, 224, generator=generator), torch.tensor([0, 1, 2, 0]))]


def run(
    model: nn.Module, path: Path, curve: Curve, batches: list[tuple[Tensor, Tensor]], noise: float = 1e-3, **how: object
) -> Profile:
    settings = Settings.build(model, **{**QUICK, "blocks": False, **how})  # type: ignore[arg-type]
    return profile(model, settings, path, batches=batches, accuracy_stride=64, target=Device(curve, noise))


def agree_rising(path: Path, values: dict[int, float]) -> None:
    """Replaces the accuracies of a journal, which random weights do not make."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "accuracy" in line:
            line["accuracy"]["value"] = values[line["tokens"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_and_r_of_a_known_staircase(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "profile.jsonl"
    run(model, path, staircase, batches)
    agree_rising(path, {2: 0.1, 4: 0.1, 68: 0.6, 132: 0.8, 196: 0.81})
    found = run(model, path, staircase, batches)
    (one,) = found.batches
    assert [step.below for step in one.steps] == list(range(32, 193, 32))
    assert one.series.tokens == tuple(range(2, 197))
    assert one.choice is not None
    assert one.choice.tokens in (127, 128, 129)  # the end of a step, where accuracy costs nothing
    assert one.choice.latency_s == pytest.approx(staircase(128), rel=0.01)
    assert one.workload[-1] == 197 * 64
    assert one.skipped == ()

    schedule = one.schedule
    assert schedule is not None
    assert schedule.keep == {1: one.choice.tokens}
    assert schedule.method == "pomt"
    expected = {"batch_size": 1, "mode": "deployed", "alpha": 0.5, "dtype": "float32", "removed": one.choice.removed}
    assert expected.items() <= schedule.origin.items()
    assert {"device", "driver", "clocks", "torch", "model"} <= schedule.origin.keys()
    schedule.save(tmp_path / "schedule.json")
    loaded = tokenprune.Schedule.load(tmp_path / "schedule.json")
    assert loaded.origin == schedule.origin
    pruned = tokenprune.apply(timm.create_model("test_vit", img_size=224), loaded)
    assert tokenprune.describe(pruned).layers[1].tokens_out == 1 + one.choice.tokens


@pytest.mark.parametrize("curve", [flat, lambda tokens: 0.02 - 5e-5 * tokens])
def test_where_nothing_beats_dense_r_is_0(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path, curve: Curve
) -> None:
    found = run(model, tmp_path / "profile.jsonl", curve, batches, stride=4)
    (one,) = found.batches
    assert one.choice is not None
    assert one.choice.removed == 0
    assert {choice.removed for choice in one.sweep} == {0}
    assert any("nothing beats dense at alpha = 0.5, so R = 0" in note for note in found.notes)
    assert any("no steps beyond the noise" in note for note in found.notes)
    assert one.schedule is not None
    assert (one.schedule.method, one.schedule.keep) == ("dense", {})
    applied = tokenprune.apply(timm.create_model("test_vit", img_size=224), one.schedule)  # without a warning
    assert tokenprune.describe(applied).blocks_macs == tokenprune.describe(applied).dense_blocks_macs
    write_profile(found, tmp_path, "")
    assert "<strong>R = 0</strong>: nothing beats dense" in (tmp_path / "report.html").read_text()


def test_coarse_says_what_was_skipped(model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    found = run(model, tmp_path / "profile.jsonl", staircase, [], coarse=8)
    (one,) = found.batches
    assert [step.below for step in one.steps] == list(range(32, 193, 32))
    assert set(one.skipped) | set(one.series.tokens) == set(range(2, 197))
    assert set(range(101, 108)) <= set(one.skipped)
    assert any("token counts were not measured: 3, 5-11" in note for note in found.notes)
    assert one.choice is None
    assert any("no images were given" in note for note in found.notes)


def test_other_settings_device_or_images_are_refused(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "profile.jsonl"
    run(model, path, flat, batches, stride=32)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="other settings: rounds: 3 there, 4 now"):
        run(model, path, flat, batches, stride=32, rounds=4)
    with pytest.raises(ProfileError, match="other accuracy: content: "):
        run(model, path, flat, [(batches[0][0] + 1, batches[0][1])], stride=32)
    monkeypatch.setattr("tokenprune_ext.environment._cpu_name", lambda: "another one")
    with pytest.raises(ProfileError, match=r"other device: device: .* there, 'another one' now"):
        run(model, path, flat, batches, stride=32)
    assert path.read_bytes() == before


def test_noise_in_which_neighbours_cannot_be_told_apart_is_said(model: nn.Module, tmp_path: Path) -> None:
    quiet = run(model, tmp_path / "quiet.jsonl", slope, [], stride=8)
    assert not any("told apart" in note for note in quiet.notes)
    loud = run(model, tmp_path / "loud.jsonl", slope, [], stride=8, noise=0.2)
    assert any("cannot be told apart" in note for note in loud.notes)


def test_another_alpha_measures_nothing_again(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "profile.jsonl"
    run(model, path, slope, batches, stride=8)
    before = path.read_bytes()
    settings = Settings.build(model, stride=8, blocks=False, **QUICK)  # type: ignore[arg-type]
    found = profile(model, settings, path, batches=batches, accuracy_stride=64, alpha=1.0, target=Device(slope, seed=5))
    assert path.read_bytes() == before
    assert found.batches[0].choice is not None
    assert found.batches[0].choice.tokens == 2


def test_report_has_everything(model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    found = run(model, tmp_path / "profile.jsonl", staircase, batches, stride=2, blocks=True, batch_sizes=(1, 2))
    predicted = {1: [(n, staircase(n)) for n in range(2, 197)]}
    checked = {1: {"dense_s": 0.01, "schedule_s": 0.008, "deviation": 0.013}}
    written = write_profile(found, tmp_path, "tokenprune profile ...", predicted=predicted, checked=checked)
    names = {path.name for path in written}
    assert names >= {f"{name}_b{b}.png" for name in ("staircase", "accuracy", "utility", "blocks") for b in (1, 2)}
    assert names >= {"profile.json", "report.html", "schedule_b1.json", "schedule_b2.json"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert 'src="http' not in page
    assert "6 steps beyond the noise" in page
    assert "+1.3 % off the profile" in page
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["settings"]["batch_sizes"] == [1, 2]
    table = BlockTable.load(tmp_path / "profile.json", 2)
    assert table == found.batches[1].blocks
    with pytest.raises(ProfileError, match=r"batch sizes \[1, 2\], not 3"):
        BlockTable.load(tmp_path / "profile.json", 3)
    with pytest.raises(ProfileError, match="is no profile"):
        BlockTable.load(tmp_path / "profile.jsonl", 1)


def test_block_table(model: nn.Module) -> None:
    table = block_latency(model, (4, 100, 196), rounds=3, target=Device(slope))
    assert table.tokens == (4, 100, 196)
    assert table.kinds == ("block 0",) * 6
    assert table.latency(3, 148) == pytest.approx(slope(148))
    dense, pruned = table.estimate({}), table.estimate({1: 100})
    assert dense == pytest.approx([slope(196)] * 6)
    assert pruned == pytest.approx([slope(196)] * 2 + [slope(100)] * 4)
    assert BlockTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    for tokens in (3, 197):
        with pytest.raises(ValueError, match=rf"tokens must be in 4..196, got {tokens}"):
            table.latency(0, tokens)
    with pytest.raises(ValueError, match=r"block must be in 0..5, got 6"):
        table.latency(6, 100)
    with pytest.raises(ValueError, match=r"counts must be patch tokens in 1..196"):
        block_latency(model, (0, 4))


def test_a_real_profile_and_its_check(model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    settings = Settings.build(model, stride=64, **QUICK)  # type: ignore[arg-type]
    found = profile(model, settings, tmp_path / "profile.jsonl", batches=batches, accuracy_stride=64)
    (one,) = found.batches
    assert all(0 < seconds < 1 for seconds in one.series.median_s)
    assert one.blocks is not None
    assert sum(one.blocks.estimate({})) > 0
    check = verify(model, settings, one, budget_s=0.0)
    assert check["profile_dense_s"] == one.series.median_s[-1]
    assert check["deviation"] > -1
    with Journal(tmp_path / "profile.jsonl") as journal:
        assert journal.accuracy[196]["value"] == found.accuracy[196]["value"]


def test_paper_mode_times_random_removal_at_the_first_layer(model: nn.Module) -> None:
    settings = Settings.build(model, mode="paper", seed=3)
    method, layer = settings.measured()
    assert (method, layer) == (tokenprune.methods.Random(seed=3), 0)
    assert (settings.deployed().name, settings.layer) == ("pomt", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "fast"}, "mode must be one of deployed, paper, got 'fast'"),
        ({"method": "topk"}, "layer must be given: topk prunes at blocks 1, 3, 4"),
        ({"method": "dense"}, "method must prune tokens, got 'dense'"),
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"layer": 6}, "layer must be at most 5 \\(test_vit has 6 blocks\\), got 6"),
        ({"min_tokens": 1}, "min_tokens must be at least 2, got 1"),
        ({"min_tokens": 196}, "min_tokens must be at most 195, got 196"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"coarse": 1}, "coarse must be at least 2, got 1"),
        ({"stride": 3, "coarse": 8}, "coarse must be a multiple of the stride 3, got 8"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        ({"visit_s": 0.0}, "visit_s must be above 0 and finite, got 0.0"),
        ({"noise_target": float("inf")}, "noise_target must be above 0 and finite, got inf"),
        ({"batch_sizes": ()}, "batch_sizes must be at least one size, each once, got \\(\\)"),
        ({"batch_sizes": (1, 1)}, "each once, got \\(1, 1\\)"),
        ({"batch_sizes": (0,)}, "batch_sizes must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(model: nn.Module, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.build(model, **change)  # type: ignore[arg-type]


def test_bad_arguments_leave_no_file(model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    settings = Settings.build(model, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, and the model is on cpu"):
        profile(model, settings, path)
    with pytest.raises(ValueError, match=r"alpha must be in 0..1, got 2"):
        profile(model, Settings.build(model), path, alpha=2)
    with pytest.raises(ValueError, match="accuracy_stride must be at least 1, got 0"):
        profile(model, Settings.build(model), path, accuracy_stride=0)
    assert not path.exists()
