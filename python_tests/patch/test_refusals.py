"""Bad arguments, schedules and images are refused by name, before anything is changed."""

from __future__ import annotations

import re
from functools import partial

import pytest
import timm
import torch
from host_models import TINY, images_for, make_host, snapshot
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenprune_ext import methods
from tokenprune_ext.methods import TopK
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply, describe, schedule_of, trace
from tokenprune_ext.schedule import Schedule

SCHEDULE = {"model": "m", "input_size": (64, 64), "num_prefix_tokens": 1, "num_patches": 16, "method": "topk"}

BAD_ARGUMENTS = {
    "no target": (ValueError, "exactly one of keep and macs", {"method": "topk"}),
    "two targets": (ValueError, "exactly one of keep and macs", {"method": "topk", "keep": 0.5, "macs": 0.5}),
    "unknown method": (ValueError, "unknown method 'best'; available: ats, auto", {"method": "best", "keep": 0.5}),
    "not a method": (TypeError, "method must be a Method or the name", {"method": 3, "keep": 0.5}),
    "a class": (TypeError, "method must be a Method or the name", {"method": TopK, "keep": 0.5}),
    "ratio 0": (ValueError, r"keep must be in \(0, 1\], got 0", {"method": "topk", "keep": 0.0}),
    "ratio above 1": (ValueError, r"keep must be in \(0, 1\], got 1.5", {"method": "topk", "keep": 1.5}),
    "ratio nan": (ValueError, r"keep must be in \(0, 1\], got nan", {"method": "topk", "keep": float("nan")}),
    "ratio a bool": (TypeError, "keep must be a float", {"method": "topk", "keep": True}),
    "ratio an int": (TypeError, "keep must be a float", {"method": "topk", "keep": 8}),
    "ratio a string": (TypeError, "keep must be a float", {"method": "topk", "keep": "0.5"}),
    "nothing kept": (ValueError, "keep=0.01 leaves none of the 16 patch", {"method": "topk", "keep": 0.01}),
    "too few entries": (ValueError, "keep has 2 entries for the 3 layers", {"method": "topk", "keep": [0.5, 0.5]}),
    "bad entry": (TypeError, "keep must hold floats", {"method": "topk", "keep": [0.5, None, 0.5]}),
    "bool entry": (TypeError, "keep must hold floats", {"method": "topk", "keep": [0.5, True, 0.5]}),
    "count 0": (ValueError, r"keep\[1\] must be at least 1, got 0", {"method": "topk", "keep": [0, 0, 0]}),
    "count too high": (ValueError, r"keep\[1\] is 17, but only 16", {"method": "topk", "keep": [17, 3, 2]}),
    "count rising": (ValueError, r"keep\[2\] is 9, but only 8", {"method": "topk", "keep": [8, 9, 2]}),
    "pomt to one": (ValueError, r"keep\[1\] is 1, but pomt leaves at least 2", {"method": "pomt", "keep": [1]}),
    "evit to one": (ValueError, r"keep\[1\] is 1, but evit leaves at least 2", {"method": "evit", "keep": [1, 1, 1]}),
    "tome to less than half": (
        ValueError,
        r"keep\[2\] is 4, but tome leaves at least 5 of 9",
        {"method": "tome", "layers": [1, 2], "keep": [9, 4]},
    ),
    "dense with keep": (ValueError, "must not be given: dense prunes nothing", {"method": "dense", "keep": 0.5}),
    "dense with macs": (ValueError, "must not be given: dense prunes nothing", {"method": "dense", "macs": 0.5}),
    "dense that prunes": (
        ValueError,
        r"keep\[1\] is 8, but dense leaves at least 16 of 16",
        {"method": "dense", "layers": [1], "keep": [8]},
    ),
    "class token alone, and pruned": (
        ValueError,
        "layer 3 computes the class token alone and must not prune",
        {"method": TopK(class_token_only=True), "layers": [2, 3], "keep": [9, 5]},
    ),
    "layer too high": (ValueError, r"layers has 4, .* layers 0..3", {"method": "topk", "layers": [4], "keep": 0.5}),
    "layer negative": (ValueError, "at least 0, got -1", {"method": "topk", "layers": [-1], "keep": 0.5}),
    "layer a float": (TypeError, "layers must be an int", {"method": "topk", "layers": [1.0], "keep": 0.5}),
    "layers descending": (ValueError, "layers must be ascending", {"method": "topk", "layers": [2, 1], "keep": 0.5}),
    "layers repeated": (ValueError, "layers must be ascending", {"method": "topk", "layers": [2, 2], "keep": 0.5}),
    "layers empty": (ValueError, "at least one block", {"method": "topk", "layers": [], "keep": 0.5}),
    "layers an int": (TypeError, "layers must be a sequence", {"method": "topk", "layers": 2, "keep": 0.5}),
    "macs 0": (ValueError, r"macs must be in \(0, 1\], got 0", {"method": "topk", "macs": 0.0}),
    "macs a string": (TypeError, "macs must be a float", {"method": "topk", "macs": "half"}),
    "macs out of reach": (
        ValueError,
        r"macs=0.3 is out of reach: topk at layers \[3\] cannot go below 0\.\d+",
        {"method": "topk", "layers": [3], "macs": 0.3},
    ),
    "schedule and keep": (
        ValueError,
        "must not be given with one",
        {"method": Schedule(**SCHEDULE, keep={1: 8}), "keep": 0.5},
    ),
    "schedule too deep": (
        ValueError,
        "keep names layer 4, .* layers 0..3",
        {"method": Schedule(**SCHEDULE, keep={4: 8})},
    ),
    "schedule, input size": (
        ValueError,
        r"input_size \(32, 128\), but .* has \(64, 64\)",
        {"method": Schedule(**{**SCHEDULE, "input_size": (32, 128)}, keep={1: 8})},
    ),
    "schedule, prefix": (
        ValueError,
        "num_prefix_tokens 5, but .* has 1",
        {"method": Schedule(**{**SCHEDULE, "num_prefix_tokens": 5}, keep={1: 8})},
    ),
    "schedule, patches": (
        ValueError,
        "num_patches 49, but .* has 16",
        {"method": Schedule(**{**SCHEDULE, "num_patches": 49}, keep={1: 8})},
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("patched", [False, True])
def test_bad_arguments_change_nothing(case, patched):
    kind, message, arguments = BAD_ARGUMENTS[case]
    model = make_host("vit")
    if patched:
        apply(model, "zero_tprune", keep=0.7)
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        apply(model, **arguments)
    assert snapshot(model) == before


def pools_all():
    """A model with a class token whose classifier reads the mean of the patch tokens."""
    return VisionTransformer(patch_size=16, **TINY, global_pool="avg", class_token=True)


UNSUITED = {
    "class token start": (
        partial(make_host, "siglip"),
        methods.ZeroTPrune(start="class"),
        "start='class' needs a class token, and vit_base_patch16_siglip_224 has none",
    ),
    "class token importance": (
        partial(make_host, "siglip"),
        methods.Peaks(importance="class"),
        "importance='class' needs a class token, and vit_base_patch16_siglip_224 has none",
    ),
    "ats without class token": (
        partial(make_host, "siglip"),
        methods.ATS(),
        "ats scores by the class token, and vit_base_patch16_siglip_224 has none",
    ),
    "ats, average pooling": (pools_all, methods.ATS(), "padding|reads all"),
    "class token alone, average pooling": (
        pools_all,
        methods.Dense(class_token_only=True),
        "class_token_only needs a model whose classifier reads the class token alone, and VisionTransformer reads",
    ),
    "class token alone, attention pooling": (
        partial(make_host, "siglip"),
        methods.TopK(class_token_only=True),
        "class_token_only needs a model whose classifier reads the class token alone",
    ),
}


@pytest.mark.parametrize("case", UNSUITED)
def test_methods_that_do_not_suit_a_model_change_nothing(case):
    """Neither as a method nor out of a schedule."""
    make, method, message = UNSUITED[case]
    model = make()
    before = snapshot(model)
    keep = None if method.name == "dense" else 0.5
    schedule = Schedule(
        **{**SCHEDULE, "num_prefix_tokens": model.num_prefix_tokens, "method": method.name},
        keep={} if keep is None else {1: 8},
        options=method.options(),
    )
    for argument in ({"method": method, "keep": keep}, {"method": schedule}):
        with pytest.raises(ValueError, match=message):
            apply(model, **argument)
        assert snapshot(model) == before


def test_a_schedule_that_prunes_where_the_class_token_is_computed_alone():
    schedule = Schedule(**SCHEDULE, keep={2: 8, 3: 6}, options={"class_token_only": True})
    with pytest.raises(ValueError, match="layer 3 computes the class token alone and must not prune"):
        apply(make_host("vit"), schedule)
    apply(make_host("vit"), Schedule(**SCHEDULE, keep={2: 8, 3: 8}, options={"class_token_only": True}))


def test_hooked_attention_keeps_the_earlier_patch():
    model = apply(make_host("vit"), "topk", layers=[2], keep=0.5)
    model.blocks[1].attn.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="forward hooks"):
        apply(model, "topk", layers=[1], keep=0.5)
    assert snapshot(model) == before
    apply(model, "topk", layers=[3], keep=0.5)  # the hooked block does not prune


def test_a_model_of_another_size():
    model = make_host("vit")
    model.patch_embed.strict_img_size = False
    model.set_input_size((96, 96))
    apply(model, "topk", keep=0.5)
    model.set_input_size((64, 64))
    message = re.escape("block 1 got 17 tokens and expects 37 (1 prefix + 36 patch): the schedule was made for 96 x 96")
    with pytest.raises(ValueError, match=message):
        model(images_for(model))
    for function in (schedule_of, describe):
        with pytest.raises(ValueError, match=r"input_size \(96, 96\)"):
            function(model)
    apply(model, "topk", keep=0.5)
    assert model(images_for(model)).shape == (2, 10)


def test_images_of_another_size():
    """A model that takes any size is pruned in proportion; any other says what it was made for."""
    model = apply(timm.create_model("vit_tiny_patch16_224", **TINY, dynamic_img_size=True), "pomt", keep=[4])
    for size, kept in (((64, 64), 4), ((96, 64), 6), ((32, 16), 2), ((48, 16), 2), ((16, 16), 1)):
        traced = trace(model, torch.randn(1, 3, *size))
        assert traced.output.shape == (1, 10)
        patches = size[0] * size[1] // 256
        assert [int(source.max()) + 1 for source in traced.sources.values()] == ([kept] if kept < patches else [])
    fixed = apply(make_host("vit"), "pomt", keep=0.5)
    with pytest.raises(ValueError, match="block 1 got 25 tokens and expects 17"):
        fixed.blocks[1](torch.randn(1, 25, 32))


def test_masks_are_refused():
    model = apply(make_host("vit"), "topk", layers=[0], keep=0.5)
    with pytest.raises(ValueError, match="attn_mask and is_causal do not work on a pruned model"):
        model.blocks[0](torch.randn(1, 17, 32), attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="attn_mask and is_causal do not work on a pruned model"):
        model.blocks[0](torch.randn(1, 17, 32), is_causal=True)


def test_functions_that_need_a_patched_model():
    model = make_host("vit")
    with pytest.raises(ValueError, match="the model is not pruned"):
        schedule_of(model)
    with pytest.raises(ValueError, match="the model is not pruned"):
        trace(model, images_for(model))
    with pytest.raises(UnsupportedModelError):
        describe(nn.Linear(2, 2))
