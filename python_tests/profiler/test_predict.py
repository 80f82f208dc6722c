"""Predictions of whole models: the products they are made of, latencies added up again, edges."""

from __future__ import annotations

import json
from math import ceil

import pytest
import timm
import torch
from host_models import ALL_HOSTS, make_host
from profiler.paper_devices import tiny_device

from tokenprune_ext.macs import block_costs, outside_macs
from tokenprune_ext.profiler.device import DeviceError, available, load_device
from tokenprune_ext.profiler.edges import Edge, find_edges
from tokenprune_ext.profiler.predict import Prediction, predict
from tokenprune_ext.profiler.products import Product, block_products
from tokenprune_ext.prune import apply

WIDTH, HIDDEN, HEADS = 32, 128, 2  # of make_host("vit"), with 16 patches and a class token


@pytest.mark.parametrize("name", ALL_HOSTS)
def test_products_have_the_macs_of_the_block(name):
    model = make_host(name)
    for cost, block in zip(block_costs(model), block_products(model), strict=True):
        attention, mlp = (sum(p.columns * p.inner for p in part) for part in (block.attention, block.mlp))
        assert (attention, mlp) == (cost.query + cost.key_value + cost.output, cost.mlp)
        assert (block.channels, block.heads, block.head_dim) == (cost.channels, cost.heads, cost.head_dim)
        assert all("product" not in p.name for p in (*block.attention, *block.mlp))


def test_products_of_dinov2_giant():
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_dinov2", img_size=224)
    blocks = block_products(model)
    assert len(blocks) == 40
    assert blocks[0].attention == (Product("attn.qkv", 4608, 1536), Product("attn.proj", 1536, 1536))
    assert blocks[0].mlp == (Product("mlp.fc1", 8192, 1536), Product("mlp.fc2", 1536, 4096))


def by_hand(model, tokens, layer, batch):
    """Seconds on the tiny device: tiles of 4 x 8, four at a time; attention 4 x 8, two at a time."""

    def product(count, columns, inner):
        return ceil(ceil(batch * count / 4) * ceil(columns / 8) / 4) * 2 * 2 * 4 * 8 * inner / 1e8

    def attention(count):
        waves = ceil(batch * HEADS * ceil(count / 4) / 2)
        return waves * 4 * 4 * ceil(count / 8) * 8 * (WIDTH // HEADS) / 1e8

    seconds = 2 * outside_macs(model, 17) * batch / 2e8
    for block in range(4):
        entering, leaving = (17 if block <= layer else tokens), (17 if block < layer else tokens)
        seconds += product(entering, 3 * WIDTH, WIDTH) + attention(entering) + product(entering, WIDTH, WIDTH)
        seconds += product(leaving, HIDDEN, WIDTH) + product(leaving, WIDTH, HIDDEN)
    return seconds


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_latency_by_hand(layer, batch):
    model = make_host("vit")
    found = predict(model, tiny_device(), batch_size=batch, layer=layer)
    assert found.tokens == tuple(range(1, 17))
    assert found.num_prefix_tokens == 1
    expected = [by_hand(model, 1 + count, layer, batch) for count in found.tokens]
    assert found.latency_s == pytest.approx(expected)


def test_kernels_by_hand():
    """Five up to the attention's sum: norm, qkv, attention, proj, sum; five behind: norm, fc1, activation, fc2, sum."""
    found = predict(make_host("vit"), tiny_device(kernel_s=1.0), layer=0)
    assert found.latency_s == pytest.approx([4 * 10] * 16, abs=0.1)


def test_memory_by_hand():
    """Where only memory takes time, 1e6 bytes a second: 2 bytes each of weights, and of what kernels read and write."""
    device = tiny_device(flop_per_clock={"float16": 1e30}, l2_bytes=1, memory_bytes_per_s=1e6)
    found = predict(make_host("vit"), device, layer=1, batch_size=3)

    def attention(n):  # weights; qkv, attention, proj; norm and sum
        return 4 * WIDTH**2 + 3 * n * (4 + 4 + 2 + 5) * WIDTH

    def mlp(n):  # weights; fc1, fc2; norm, activation and sum
        return 2 * WIDTH * HIDDEN + 3 * n * (2 * (WIDTH + HIDDEN) + 5 * WIDTH + 2 * HIDDEN)

    expected = [2e-6 * (2 * attention(17) + 2 * attention(n) + mlp(17) + 3 * mlp(n)) for n in range(2, 18)]
    assert found.latency_s == pytest.approx(expected, rel=1e-3)


def test_waves_and_edges_by_hand():
    """Rows of tiles have 4 tokens; with the class token, one is empty at 3, 7, 11 and 15 patches."""
    found = predict(make_host("vit"), tiny_device(), layer=0)
    assert found.waves["attn.qkv"] == tuple(3 * ceil(n / 4) for n in range(2, 18))
    assert found.waves["mlp.fc1"] == tuple(4 * ceil(n / 4) for n in range(2, 18))
    assert found.waves["attention"] == tuple(ceil(n / 4) for n in range(2, 18))
    assert [(edge.tokens, edge.next) for edge in found.edges] == [(3, 4), (7, 8), (11, 12), (15, 16)]
    assert found.edges[0].kernels == ("attn.qkv", "attention", "attn.proj", "mlp.fc1", "mlp.fc2")
    step = found.latency_s[15] - found.latency_s[14]
    assert found.edges[-1].fall == pytest.approx(step / found.latency_s[15])
    assert predict(make_host("vit"), tiny_device(), layer=0, min_fall=0.99).edges == ()


def test_the_default_layer_is_a_quarter_of_the_depth():
    assert predict(make_host("vit"), tiny_device()).layer == 1
    assert predict(timm.create_model("deit_tiny_patch16_224"), tiny_device()).layer == 3


def test_a_patched_model_and_one_without_prefix():
    dense, siglip = predict(make_host("vit"), tiny_device()), predict(make_host("siglip"), tiny_device())
    assert predict(apply(make_host("vit"), "topk", keep=0.5), tiny_device()) == dense
    assert siglip.num_prefix_tokens == 0
    assert siglip.waves["attn.qkv"][3] < siglip.waves["attn.qkv"][4]  # 4 tokens, not 4 and a class token


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("batch", [1, 4])
def test_more_tokens_never_take_less_time(name, batch):
    found = predict(timm.create_model("deit_small_patch16_224"), load_device(name), batch_size=batch)
    assert list(found.latency_s) == sorted(found.latency_s)
    for counts in found.waves.values():
        assert min(counts) >= 1
    for edge in found.edges:
        assert edge.next == edge.tokens + 1
        assert edge.kernels
        assert found.latency_s[edge.next - 1] > found.latency_s[edge.tokens - 1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layer": 4}, ValueError, "layer must be one of the 4 blocks, 0 to 3; got 4"),
        ({"layer": -1}, ValueError, "got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"dtype": "bfloat16"}, DeviceError, "tiny has no rate for bfloat16"),
    ],
)
def test_what_cannot_be_predicted(options, error, said):
    with pytest.raises(error, match=said):
        predict(make_host("vit"), tiny_device(), **options)


def test_json_round_trip():
    found = predict(make_host("vit"), tiny_device())
    plain = json.loads(json.dumps(found.as_json()))
    assert "not measured" in plain["source"]
    assert Prediction.from_json(plain) == found
    for damaged in ({**plain, "format": 2}, {**plain, "edges": 3}, {**plain, "more": 1}, {"format": 1}):
        with pytest.raises(ValueError, match="prediction"):
            Prediction.from_json(damaged)


def test_edges_of_a_curve():
    """A slope of 1 a token, and two falls that exceed it by 5 and by 10; the second is over three tokens."""
    tokens = (1, 2, 3, 4, 7, 8)
    latency = (80.0, 81.0, 87.0, 88.0, 99.0, 100.0)  # on average 20 / 7 a token
    slope = 20 / 7
    assert find_edges(tokens, latency) == [Edge(2, 3, 0.06), Edge(4, 7, 0.11)]
    assert find_edges(tokens, latency, (6 - slope) / 100 + 1e-9) == []
    assert find_edges(tokens, latency, (11 - 3 * slope) / 100 + 1e-9) == [Edge(2, 3, 0.06)]
    assert find_edges((1, 2, 3), (1.0, 2.0, 3.0)) == []  # a straight line has none
    assert find_edges((5,), (1.0,)) == []
    assert [edge.tokens for edge in find_edges((1, 2, 3), (3.0, 1.0, 2.0))] == [2]  # slower at few tokens
    assert find_edges((1, 2, 3), (3.0, 2.0, 2.0)) == []
