"""Schedules: solving, saving, loading, and refusing what is wrong."""

from __future__ import annotations

import json
from functools import cache

import pytest
from host_models import PRUNING, make_host
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_ext import methods
from tokenprune_ext.macs import block_costs, blocks_macs
from tokenprune_ext.methods import Dense
from tokenprune_ext.patch import UnsupportedModelError, inspect_host
from tokenprune_ext.prune import apply, describe, schedule_of
from tokenprune_ext.schedule import Schedule

MODEL = make_host("vit")  # depth 4, 16 patches; never patched here
DEEP = make_host("vit", depth=12, img_size=112)  # 49 patches


def cost(model, schedule):
    """MACs of the blocks and of scoring as a fraction of the dense model's."""
    return fraction(model, schedule.keep, schedule.build_method())


def fraction(model, keep, method):
    costs, host = costs_of(model), inspect_host(model)
    return sum(map(sum, blocks_macs(costs, host, keep, method))) / sum(map(sum, blocks_macs(costs, host, {}, Dense())))


costs_of = cache(block_costs)


def test_build_from_ratio():
    schedule = Schedule.build(DEEP, "zero_tprune", keep=0.7)
    assert schedule.keep == {2: 34, 5: 23, 8: 16}  # floors of 34.3, 23.8, 16.1
    assert (schedule.model, schedule.method) == ("vit_tiny_patch16_224", "zero_tprune")
    assert (schedule.input_size, schedule.num_prefix_tokens, schedule.num_patches) == ((112, 112), 1, 49)
    assert schedule.options == methods.create("zero_tprune").options()
    assert schedule.entering() == {2: 49, 5: 34, 8: 23}


def test_build_from_one_entry_a_layer():
    schedule = Schedule.build(DEEP, methods.Random(seed=5), layers=(1, 4, 11), keep=(0.9, 30, 0.5))
    assert schedule.keep == {1: 44, 4: 30, 11: 15}
    assert schedule.build_method() == methods.Random(seed=5)


def test_ratio_one_keeps_all_and_count_one_keeps_one():
    assert Schedule.build(MODEL, "topk", layers=[1], keep=[1.0]).keep == {1: 16}
    assert Schedule.build(MODEL, "topk", layers=[1], keep=[1]).keep == {1: 1}


@pytest.mark.parametrize("name", PRUNING)
def test_macs_of_one_layer_are_the_largest_that_fit(name):
    method = methods.create(name)
    schedules = [Schedule.build(DEEP, method, layers=[3], keep=[count]) for count in range(method.min_keep(49), 50)]
    for target in (0.65, 0.7, 0.8, 0.997, 1.0):
        best = max((s for s in schedules if cost(DEEP, s) <= target), key=lambda s: s.keep[3])
        assert Schedule.build(DEEP, method, layers=[3], macs=target) == best


def test_macs_target_hit_exactly():
    """A cost that a schedule has is not missed by a rounding error, however fine the steps are."""
    model = make_host("vit", img_size=512)  # 1024 patches
    for count in (1, 2, 333, 511, 512, 777, 1022, 1023, 1024):
        schedule = Schedule.build(model, "topk", layers=[1], keep=[count])
        assert Schedule.build(model, "topk", layers=[1], macs=cost(model, schedule)).keep == {1: count}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(PRUNING), st.floats(0.45, 0.98), st.sets(st.integers(0, 6), min_size=1, max_size=4))
def test_macs_of_several_layers(name, target, layers):
    """Within the target, from one common strength, and no larger plan of the method fits."""
    layers = sorted(layers)
    try:
        schedule = Schedule.build(DEEP, name, layers=layers, macs=target)
    except ValueError as error:
        assert "out of reach" in str(error)  # noqa: PT017
        return
    assert cost(DEEP, schedule) <= target
    method = schedule.build_method()
    plans = {tuple(method.plan(thousandths / 1000, layers, 49).items()) for thousandths in range(1001)}
    assert max(share for plan in plans if (share := fraction(DEEP, dict(plan), method)) <= target) <= cost(
        DEEP, schedule
    )


def test_macs_out_of_reach():
    with pytest.raises(ValueError, match=r"macs=0.2 is out of reach: topk at layers \[9\] cannot go below 0\.\d\d\d"):
        Schedule.build(DEEP, "topk", layers=[9], macs=0.2)


def test_applied_cost_is_the_described_cost():
    model = make_host("dinov2_reg4")
    apply(model, "pomt", macs=0.8)
    description = describe(model)
    spent = description.blocks_macs + description.scoring_macs
    assert description.scoring_macs > 0
    assert spent <= 0.8 * description.dense_blocks_macs
    assert spent / description.dense_blocks_macs == cost(model, schedule_of(model))


def test_a_last_block_for_the_class_token_alone_is_no_default_layer():
    for name in ("ats", "tome"):
        method = methods.create(name, class_token_only=True)
        assert list(Schedule.build(DEEP, method, keep=0.8).keep) == list(method.default_layers(12))[:-1]
        assert 11 in Schedule.build(DEEP, name, keep=0.8).keep


def test_dense_has_no_counts():
    method = methods.create("dense", class_token_only=True)
    schedule = Schedule.build(DEEP, method)
    assert schedule.keep == {}
    assert schedule.build_method() == method
    assert cost(DEEP, schedule) < 1


def test_build_ignores_a_patch_in_place():
    model = apply(make_host("vit"), "zero_tprune", keep=0.5)
    assert Schedule.build(model, "topk", macs=0.7) == Schedule.build(MODEL, "topk", macs=0.7)


def test_build_refuses_unknown_models():
    with pytest.raises(UnsupportedModelError, match="Identity"):
        Schedule.build(MODEL.norm_pre, "topk", keep=0.5)


@pytest.mark.parametrize("name", methods.available())
def test_file_round_trip(name, tmp_path):
    schedule = Schedule.build(DEEP, name, keep=None if name == "dense" else 0.8)
    path = tmp_path / "schedule.json"
    schedule.save(path)
    loaded = Schedule.load(str(path))
    assert loaded == schedule
    assert loaded.input_size == (112, 112)
    assert list(loaded.keep) == list(schedule.keep)
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert content["method"] == schedule.method == ("peaks" if name == "auto" else name)


def valid():
    """The content of a correct file."""
    return {
        "format": 1,
        "model": "vit_tiny_patch16_224",
        "input_size": [64, 64],
        "num_prefix_tokens": 1,
        "num_patches": 16,
        "method": "zero_tprune",
        "keep": {"1": 12, "2": 8},
        "options": {"start": "uniform"},
    }


def test_options_left_out_get_their_defaults(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(valid()))
    assert Schedule.load(path).build_method() == methods.create("zero_tprune", start="uniform")


BAD_FIELDS = {
    "format": (2, "format must be 1"),
    "model": (3, "model must be a string, got 3"),
    "input_size": ([64], r"input_size must be height and width, got \[64\]"),
    "input_size ": ([64, 0], "input_size must be at least 1, got 0"),
    "input_size  ": ([64, "64"], "input_size must be an int, got '64'"),
    "num_prefix_tokens": (-1, "num_prefix_tokens must be at least 0, got -1"),
    "num_prefix_tokens ": (None, "num_prefix_tokens must be an int, got None"),
    "num_patches": (16.0, "num_patches must be an int, got 16.0"),
    "num_patches ": (True, "num_patches must be an int, got True"),
    "method": ("best", "unknown method 'best'; available: "),
    "method ": (["topk"], "method must be a string"),
    "options": ({"strat": "class"}, "method 'zero_tprune' has no option strat"),
    "options ": ({"start": "cls"}, "start must be one of auto, class, uniform"),
    "options  ": ([], "options must be a mapping"),
    "keep": ([12, 8], "keep must map block indices to token counts"),
    "keep ": ({"-1": 12}, "keep must map block indices to token counts"),
    "keep  ": ({"one": 12}, "keep must map block indices to token counts"),
    "keep   ": ({"1": 0}, r"keep\[1\] must be at least 1, got 0"),
    "keep    ": ({"1": 0.5}, r"keep\[1\] must be an int, got 0.5"),
    "keep     ": ({"1": 17}, r"keep\[1\] is 17, but only 16 patch tokens enter layer 1"),
    "keep      ": ({"1": 8, "2": 9}, r"keep\[2\] is 9, but only 8 patch tokens enter layer 2"),
    "keep       ": ({"2": 9, "1": 8}, "keep must list its layers in ascending order"),
    "keap": ({"1": 3}, r"unknown fields \['keap'\]"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_files_name_the_file_and_the_field(field, tmp_path):
    value, message = BAD_FIELDS[field]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**valid(), field.strip(): value}))
    with pytest.raises(ValueError, match=message) as caught:
        Schedule.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("field", [name for name in valid() if name != "format"])
def test_missing_fields(field, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({name: value for name, value in valid().items() if name != field}))
    with pytest.raises(ValueError, match=rf"bad.json: unknown fields \[\], missing fields \['{field}'\]"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "bad.json: not JSON"),
        (b"", "bad.json: not JSON"),
        (b"[1]", "got list"),
        (b"{}", "format must be 1"),
        (b"\xff\xfe", "bad.json"),
    ],
)
def test_files_that_are_no_schedules(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Schedule.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such schedule file: .*none.json"):
        Schedule.load(tmp_path / "none.json")


def test_schedules_do_not_share_their_mappings():
    keep = {1: 8}
    schedule = Schedule("m", (64, 64), 1, 16, "topk", keep)
    keep[1] = 99
    assert schedule.keep == {1: 8}
    with pytest.raises(AttributeError):
        schedule.keep = {}
