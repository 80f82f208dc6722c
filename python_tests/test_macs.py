"""MACs against the papers' formula and against torch's own counter."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from host_models import HOSTS, make_host
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2_swiglu", "deit_distilled"])
@pytest.mark.parametrize("method", ["random", "topk"])
def test_pruned_macs_agree_with_the_counter(name, method):
    """These two score with one row of queries, or with an operator that the counter does not know."""
    model = apply(make_host(name), method, layers=[0, 2], keep=[9, 5])
    description = describe(model)
    prefix, width = model.num_prefix_tokens, 32
    scoring = 0
    if method == "topk" and model.cls_token is not None:
        scoring = sum(tokens * width for tokens in (prefix + 16, prefix + 9))
    assert description.blocks_macs + scoring == counted(model, "blocks")
    assert description.model_macs + scoring == counted(model)


def test_standard_block_is_the_papers_formula():
    model = make_host("vit")
    host, costs = inspect_host(model), block_costs(model)
    n, width = 17, 32
    assert blocks_macs(costs, host, {}, "block") == [12 * n * width**2 + 2 * n**2 * width] * 4


def test_where_the_tokens_leave_decides_what_the_mlp_costs():
    model = make_host("vit")
    host, costs = inspect_host(model), block_costs(model)
    n, m, width = 17, 10, 32
    dense, after = (12 * t * width**2 + 2 * t**2 * width for t in (n, m))
    assert blocks_macs(costs, host, {1: 9}, "block") == [dense, dense, after, after]
    between = 4 * n * width**2 + 2 * n**2 * width + 8 * m * width**2
    assert blocks_macs(costs, host, {1: 9}, "attention") == [dense, between, after, after]


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
    assert description.layers[1] == LayerReport(1, 17, 11, description.layers[1].macs, description.layers[0].dense_macs)
    assert [(layer.tokens_in, layer.tokens_out) for layer in description.layers] == [
        (17, 17),
        (17, 11),
        (11, 11),
        (11, 11),
    ]
    assert [layer.block for layer in description.layers] == [0, 1, 2, 3]
    assert sum(layer.macs for layer in description.layers) == description.blocks_macs
    text = str(description)
    assert text.startswith("vit_tiny_patch16_224 at 64 x 64: topk, pruning at blocks 1\n")
    assert "17 -> 11" in text
    assert str(describe(remove(model))).startswith("vit_tiny_patch16_224 at 64 x 64: dense\n")
