"""MACs against the papers' formula and against torch's own counter."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from host_models import HOSTS, PRUNING, make_host
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenprune_ext import methods
from tokenprune_ext.macs import block_costs, blocks_macs, outside_macs
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.prune import LayerReport, apply, describe, remove


def counted(model, part=None):
    """MACs of a real forward on the meta device, of the whole model or of one named part."""
    twin = copy.deepcopy(model).to("meta").requires_grad_(False)
    height, width = model.patch_embed.img_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, height, width, device="meta"))
    counts = counter.get_flop_counts()["Global" if part is None else f"{type(model).__name__}.{part}"]
    return sum(counts.values()) // 2


@pytest.mark.parametrize("name", HOSTS)
def test_dense_macs_agree_with_the_counter(name):
    model = make_host(name)
    description = describe(model)
    assert description.blocks_macs == description.dense_blocks_macs == counted(model, "blocks")
    assert description.model_macs == description.dense_model_macs == counted(model)
    assert description.method is None


# Peaks by page rank: sizes would pad the channels, and lengths of values are no product.
_PLAIN = {"proportional": False, "value_length": False}
CHARGED = {
    **{name: methods.create(name) for name in PRUNING},
    "peaks wpr": methods.create("peaks", importance="wpr", **_PLAIN),
    "peaks received": methods.create("peaks", importance="received", **_PLAIN),
    "peaks norm": methods.create("peaks", importance="norm"),
    "zero_tprune key_heads": methods.create("zero_tprune", feature="key_heads", similar=2),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("vit", method) for method in CHARGED),
        ("siglip", "topk"),
        ("dinov2_swiglu", "tome"),
        ("deit_distilled", "ats"),
    ],
)
def test_pruned_macs_agree_with_the_counter(name, method):
    """What a budget is charged for, choosing tokens included, is what torch counts."""
    model = apply(make_host(name), CHARGED[method], layers=[0, 2], keep=[11, 7])
    description = describe(model)
    assert description.blocks_macs + description.scoring_macs == counted(model, "blocks")
    assert description.model_macs + description.scoring_macs == counted(model)


def test_standard_block_is_the_papers_formula():
    model = make_host("vit")
    host, costs = inspect_host(model), block_costs(model)
    n, width = 17, 32
    assert blocks_macs(costs, host, {}, methods.Dense()) == [(12 * n * width**2 + 2 * n**2 * width, 0)] * 4


def test_where_the_tokens_leave_decides_what_the_mlp_costs():
    model = make_host("vit")
    host, costs = inspect_host(model), block_costs(model)
    n, m, width = 17, 10, 32
    dense, after = (12 * t * width**2 + 2 * t**2 * width for t in (n, m))
    behind, between = ([macs for macs, _ in blocks_macs(costs, host, {1: 9}, method)] for method in
                       (methods.ZeroTPrune(), methods.TopK()))  # fmt: skip
    assert behind == [dense, dense, after, after]
    assert between == [dense, 4 * n * width**2 + 2 * n**2 * width + 8 * m * width**2, after, after]


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_reg4", "clip"])
@pytest.mark.parametrize("keep", [None, [9, 5]])
def test_a_last_block_for_the_class_token_alone_agrees_with_the_counter(name, keep):
    model = make_host(name)
    if keep is None:
        apply(model, methods.create("dense", class_token_only=True))
    else:
        apply(model, methods.create("random", class_token_only=True), layers=[0, 2], keep=keep)
    description = describe(model)
    assert description.class_token_only
    assert description.blocks_macs == counted(model, "blocks")
    assert description.model_macs == counted(model)
    head = inspect_host(model).head_tokens
    assert description.layers[3].tokens_out == head
    tokens, width, hidden = description.layers[3].tokens_in, 32, 128
    formula = 2 * (tokens + head) * width**2 + 2 * head * tokens * width + 2 * head * width * hidden
    assert description.layers[3].macs == formula
    assert "the last block for the class token alone" in str(description)


def test_scoring_by_hand():
    """196 patches of DeiT-S: 6 heads of 64 channels; what each method multiplies to choose 100 of them."""
    cost = block_costs(timm.create_model("deit_small_patch16_224"))[0]
    host = inspect_host(timm.create_model("deit_small_patch16_224"))
    n, width, heads = 197, 384, 6
    row, product, merging = n * width, n**2 * width, 96 * 100 * width
    wanted = {
        "random": 0,
        "topk": row,
        "evit": row,
        "pomt": product,
        "ats": 2 * row,
        "tome": 98 * 98 * 64,
        "peaks": 196 * 195 // 2 * width + 2 * row + merging,  # every pair once, attention, length of values
        # one product and one reading for I', pairs of keys of one head, the same and five readings for I
        "zero_tprune": product + n**2 * heads + 98 * 98 * 64 + 187**2 * width + 5 * 187**2 * heads,
    }
    assert {name: methods.create(name).scoring_macs(cost, host, 5, n, 100) for name in wanted} == wanted
    early, middle = (methods.create("zero_tprune").scoring_macs(cost, host, layer, n, 100) for layer in (2, 3))
    assert early - middle == (30 - 5) * 187**2 * heads


@pytest.mark.parametrize(("name", "published"), [("deit_small_patch16_224", 4.6), ("deit_tiny_patch16_224", 1.26)])
def test_published_sizes(name, published):
    """DeiT-S 4.6 G and DeiT-Ti 1.3 G, as in the papers' tables."""
    assert describe(timm.create_model(name)).model_macs / 1e9 == pytest.approx(published, rel=0.01)


def test_a_single_layer_of_deit_small():
    """The POMT cut of 69 tokens at block 3, added up by hand."""
    model = apply(timm.create_model("deit_small_patch16_224"), "pomt", keep=[196 - 69])
    n, m, width = 197, 128, 384
    block = {t: 12 * t * width**2 + 2 * t**2 * width for t in (n, m)}
    expected = 3 * block[n] + 4 * n * width**2 + 2 * n**2 * width + 8 * m * width**2 + 8 * block[m]
    assert describe(model).blocks_macs == expected


def test_outside_macs_leave_the_model_alone():
    model = make_host("siglip")
    before = {name: (id(p), p.device) for name, p in model.named_parameters()}
    patches = [outside_macs(model, count) for count in (16, 8)]
    assert patches[0] > patches[1]  # attention pooling
    assert {name: (id(p), p.device) for name, p in model.named_parameters()} == before
    assert outside_macs(make_host("vit"), 16) == outside_macs(make_host("vit"), 8)


def test_describe():
    model = apply(make_host("vit"), "topk", layers=[1, 2], keep=[10, 10])
    description = describe(model)
    assert description.method == "topk"
    dense, pruned = description.layers[:2]
    assert pruned == LayerReport(1, 17, 11, pruned.macs, 17 * 32, dense.dense_macs)  # one row of q k^T for the scores
    assert [(layer.tokens_in, layer.tokens_out) for layer in description.layers] == [
        (17, 17),
        (17, 11),
        (11, 11),
        (11, 11),
    ]
    assert [layer.block for layer in description.layers] == [0, 1, 2, 3]
    assert sum(layer.macs for layer in description.layers) == description.blocks_macs
    assert sum(layer.scoring_macs for layer in description.layers) == description.scoring_macs == 17 * 32
    text = str(description)
    assert text.startswith("vit_tiny_patch16_224 at 64 x 64: topk, pruning at blocks 1\n")
    assert "17 -> 11" in text
    spent = description.blocks_macs + description.scoring_macs
    assert f"with scoring: {spent / 1e9:.3f} of" in text
    assert str(describe(remove(model))).startswith("vit_tiny_patch16_224 at 64 x 64: dense\n")
