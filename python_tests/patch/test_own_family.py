"""Users' own models with the adapters from CONTRIBUTING.md, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from host_models import PRUNING, snapshot
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tokenprune_ext import methods
from tokenprune_ext.patch import BlockPlan, UnsupportedModelError, adapter, adapter_of, inspect_host, install
from tokenprune_ext.prune import apply, describe, remove, trace

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


class MyBlock(nn.Module):
    def __init__(self, channels=32, heads=4):
        super().__init__()
        self.heads, self.scale = heads, 0.3
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(channels, 64), nn.GELU(), nn.Linear(64, channels))

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = self.proj(y.transpose(1, 2).flatten(2)) + x
        return self.mlp(self.norm2(x)) + x


class PlainAttention(nn.Module):
    """As in DeiT's first code, LV-ViT and T2T-ViT: the matrix is formed."""

    def __init__(self, channels=32, heads=4):
        super().__init__()
        self.num_heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attn_drop, self.proj_drop = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop(((q * self.scale) @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class PlainBlock(nn.Module):
    def __init__(self, channels=32):
        super().__init__()
        self.norm1, self.norm2, self.drop_path = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.Identity()
        self.attn = PlainAttention(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 64), nn.GELU(), nn.Linear(64, channels))

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MyViT(nn.Module):
    channels, block, name = 32, MyBlock, "layers"

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, self.channels, 16, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, self.channels))
        self.places = nn.Parameter(torch.randn(1, 17, self.channels))
        setattr(self, self.name, nn.ModuleList(self.block() for _ in range(4)))
        self.head = nn.Linear(self.channels, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.places
        for layer in getattr(self, self.name):
            x = layer(x)
        return self.head(x[:, 0])


class SmallViT(MyViT):
    block, name = PlainBlock, "blocks"


@pytest.fixture(params=[SmallViT, MyViT])
def model(request, monkeypatch):
    if not GUIDE.exists():
        pytest.skip("no source tree")
    monkeypatch.setattr(adapter, "_adapters", list(adapter._adapters))  # the registration ends with the test
    section = GUIDE.read_text("utf-8").split("## Add a family of models")[1]
    for guide in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        if request.param.__name__ in guide:
            exec(guide, {request.param.__name__: request.param})
    torch.manual_seed(0)
    return request.param().eval()


@pytest.mark.parametrize("method", PRUNING)
def test_every_method(model, method):
    images = torch.randn(2, 3, 64, 64)
    before, dense = snapshot(model), model(images)
    assert apply(model, method, keep=0.7) is model
    pruned = trace(model, images)
    assert pruned.sources
    assert pruned.output.isfinite().all()
    assert not torch.equal(pruned.output, dense)
    assert describe(model).blocks_macs < describe(model).dense_blocks_macs
    remove(model)
    assert torch.equal(model(images), dense)
    assert snapshot(model) == before


def test_a_budget(model):
    apply(model, "peaks", macs=0.7)
    report = describe(model)
    assert 0.6 < (report.blocks_macs + report.scoring_macs) / report.dense_blocks_macs <= 0.7


def test_blocks_that_prune_nothing_are_identical(model):
    images = torch.randn(2, 3, 64, 64)
    dense = model(images)
    host = inspect_host(model)
    plan = [BlockPlan(adapter_of(model), host, methods.create("topk"), layer, 16, 16) for layer in range(host.depth)]
    install(model, dict(enumerate(plan)), "record")
    if isinstance(model, SmallViT):  # its own attention is not fused
        torch.testing.assert_close(model(images), dense)
    else:
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("model", [SmallViT], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block, "ls1", nn.Identity()), r"blocks.2 is not supported: unknown parts \['ls1'\]"),
        (lambda block: setattr(block.attn, "q_norm", nn.Identity()), r"blocks.2.attn .* unknown parts \['q_norm'\]"),
        (lambda block: block.attn.register_forward_hook(lambda *args: None), "its attn has forward hooks"),
    ],
)
def test_parts_that_would_be_left_out_are_refused(model, change, message):
    change(model.blocks[2])
    with pytest.raises(UnsupportedModelError, match=message):
        apply(model, "topk", layers=[2], keep=0.5)


@pytest.mark.parametrize("model", [SmallViT], indirect=True)
@pytest.mark.parametrize("name", ["attn_drop", "proj_drop"])
def test_dropout_takes_part_in_training(model, name):
    """In the block that prunes, and nowhere else."""
    images = torch.randn(2, 3, 64, 64)
    for block in model.blocks:
        block.attn.attn_drop.p = block.attn.proj_drop.p = 0.0
    getattr(model.blocks[1].attn, name).p = 0.5
    apply(model.train(), "topk", layers=[1], keep=0.9)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_without_the_adapter_it_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"MyViT is not supported\. Supported: timm Vision"):
        apply(MyViT(), "topk", keep=0.5)
