"""A smaller model is the gated one whose pruned gates are 0."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from host_models import PRUNING, make_host, skip_unsuited, snapshot
from vtp.gated_models import VTP_HOSTS, gated_host, images_for, train_gates, zero_pruned

import tokenprune_ext as tokenprune
from tokenprune_ext import methods, vtp
from tokenprune_ext.export.onnx import export_onnx
from tokenprune_ext.macs import block_costs
from tokenprune_ext.patch.narrow import NarrowLinear

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_close(mine, theirs):
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rate", [0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VTP_HOSTS)
def test_exact(name, dtype, rate):
    model = gated_host(name, dtype)
    before, images = snapshot(model), images_for(model)
    smaller = vtp.prune(model, rate)
    assert snapshot(model) == before
    widths = [width for block in vtp.widths_of(smaller) for width in block]
    total = sum(gate.numel() for gate in vtp.gates_of(model).values())
    assert sum(widths) == total - round(rate * total)
    assert not vtp.gates_of(smaller)
    assert smaller.training is model.training
    assert_close(smaller(images), zero_pruned(model, smaller)(images))


def test_one_channel_at_every_place():
    model = gated_host(dtype=torch.float64)
    smaller = vtp.prune(model, 1 - 4 * 4 / (4 * 7 * 32))
    assert set(vtp.widths_of(smaller)) == {(1, 1, 1, 1)}
    assert_close(smaller(images_for(model)), zero_pruned(model, smaller)(images_for(model)))


def test_a_narrow_layer_is_a_dense_one_with_zeros():
    narrow = NarrowLinear(7, 5, 3, 3, whole=2)
    with torch.no_grad():
        narrow.inputs.copy_(torch.tensor([0, 4, 6]))
        narrow.outputs.copy_(torch.tensor([2]))
    dense = torch.nn.Linear(7, 5)
    with torch.no_grad():
        dense.weight.zero_()[[[0], [1], [4]], [0, 4, 6]] = narrow.weight
        dense.bias.zero_()[[0, 1, 4]] = narrow.bias
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    narrow, dense = narrow.double(), dense.double()
    torch.testing.assert_close(narrow(x), dense(x))
    torch.testing.assert_close(narrow.write(narrow(x)[..., [4]], first=2), dense(x)[..., 2:])
    assert torch.autograd.gradcheck(narrow, (x,))
    assert "kept_inputs=3, kept_outputs=3" in str(narrow)


def test_weights_that_are_left():
    """Columns of what reads the place; rows of V and fc1; all rows of queries and keys; nothing of the residual."""
    model = gated_host()
    smaller = vtp.prune(model, 0.5)
    for (qkv, proj, fc1, fc2), block in zip(vtp.widths_of(smaller), smaller.blocks, strict=True):
        assert block.attn.qkv.weight.shape == (2 * 32 + proj, qkv)
        assert block.attn.qkv.bias.shape == (2 * 32 + proj,)
        assert block.attn.proj.weight.shape == (32, proj)
        assert block.mlp.fc1.weight.shape == (fc2, fc1)
        assert block.mlp.fc2.weight.shape == (32, fc2)
        assert type(block.mlp.fc2) is torch.nn.Linear
    assert sum(map(torch.numel, smaller.parameters())) < sum(map(torch.numel, make_host("deit").parameters()))
    assert {type(part) for part in smaller.modules()} - {type(p) for p in make_host("deit").modules()} == {NarrowLinear}


def test_nothing_removed_is_a_dense_model():
    model = vtp.add_gates(make_host("deit"))
    whole = vtp.prune(model, 0)
    assert whole.state_dict().keys() == make_host("deit").state_dict().keys()
    assert not any(isinstance(part, NarrowLinear) for part in whole.modules())
    assert torch.equal(whole(images_for(model)), model(images_for(model)))


def test_report():
    smaller = vtp.prune(gated_host(), 0.5)
    report = vtp.report(smaller)
    assert report.blocks == tuple(vtp.widths_of(smaller))
    lines = str(report).splitlines()
    assert lines[0].split() == ["block", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert lines[1].split() == ["0", *map(str, report.blocks[0])]
    assert lines[-1] == f"{sum(map(torch.numel, smaller.parameters())) / 1e6:.2f} M parameters"


def test_copies_and_dtypes():
    smaller = vtp.prune(gated_host(), 0.5)
    images = images_for(smaller)
    for other in (copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller))):
        assert torch.equal(other(images), smaller(images))
    exact = smaller(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(smaller(images).float(), exact, rtol=0.1, atol=0.2)
    assert smaller.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert smaller.blocks[0].attn.qkv.inputs.dtype == torch.int64


def test_fine_tuning():
    model = gated_host("dropout").train()
    model.blocks[1].attn.proj.weight.requires_grad_(False)
    smaller = vtp.prune(model, 0.5)
    assert smaller.training
    frozen = [name for name, parameter in smaller.named_parameters() if not parameter.requires_grad]
    assert frozen == ["blocks.1.attn.proj.weight"]
    before = smaller(images_for(smaller)).square().mean()
    before.backward()
    assert all(p.grad is not None for name, p in smaller.named_parameters() if name not in frozen)
    assert smaller.state_dict().keys() - make_host("dropout").state_dict().keys() == {
        f"blocks.{block}.{buffer}"
        for block in range(4)
        for buffer in ("attn.qkv.inputs", "attn.qkv.outputs", "attn.proj.inputs", "mlp.fc1.inputs")
    }


def test_compile_and_export():
    smaller = vtp.prune(gated_host(), 0.5)
    images = images_for(smaller)
    with torch.no_grad():
        expected = smaller(images)
        compiled = torch.compile(smaller, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)
        program = torch.export.export(smaller, (images,))
        torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("name", ["deit_distilled", "qk_norm", "reg4_gap"])
def test_every_token_method_composes(name, method):
    """What it computes is what it computes on the dense model whose removed weights are 0."""
    model = gated_host(name, torch.float64)
    skip_unsuited(method, model)
    smaller = vtp.prune(model, 0.4)
    same = dense_with_zeros(smaller, name)
    images = images_for(model)
    assert_close(smaller(images), same(images))
    for each in (smaller, same):
        tokenprune.apply(each, method, keep=0.8)
    assert tokenprune.describe(smaller).blocks_macs < tokenprune.describe(same).blocks_macs
    assert_close(smaller(images), same(images))
    if name == "qk_norm":
        torch.compiler.reset()
        assert_close(torch.compile(smaller, fullgraph=True, backend="eager")(images), smaller(images))


def dense_with_zeros(smaller, name):
    """The dense model with the weights of a smaller one, and 0 where it has none."""
    dense = make_host(name, torch.float64)
    state = smaller.state_dict()
    with torch.no_grad():
        for key, value in dense.state_dict().items():
            part, _, kind = key.rpartition(".")
            own = state[key]
            if kind == "weight" and f"{part}.inputs" in state:
                own = own.new_zeros(len(own), value.shape[1]).index_copy_(1, state[f"{part}.inputs"], own)
            if f"{part}.outputs" in state:  # rows of all queries and keys, then those of some values
                rows = torch.cat([torch.arange(64), 64 + state[f"{part}.outputs"]])
                own = own.new_zeros(96, *own.shape[1:]).index_copy_(0, rows, own)
            value.zero_()[tuple(map(slice, own.shape))] = own  # hidden channels that went are at the end
    return dense


@pytest.mark.parametrize("name", ["deit", "deit_distilled", "qk_norm"])
def test_class_token_only_is_exact_and_cheaper(name):
    smaller = vtp.prune(gated_host(name, torch.float64), 0.5)
    images = images_for(smaller)
    expected = smaller(images)
    tokenprune.apply(smaller, methods.create("dense", class_token_only=True))
    assert_close(smaller(images), expected)
    description = tokenprune.describe(smaller)
    assert description.blocks_macs < description.dense_blocks_macs


def test_macs():
    smaller = vtp.prune(train_gates(vtp.add_gates(make_host("deit"))), 0.5)
    for (qkv, proj, fc1, fc2), cost in zip(vtp.widths_of(smaller), block_costs(smaller), strict=True):
        assert cost.query == 32 * qkv
        assert cost.key_value == (32 + proj) * qkv
        assert cost.output == 32 * proj
        assert cost.mlp == (fc1 + 32) * fc2
        assert cost.heads * cost.head_dim == 32


def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    smaller = vtp.prune(gated_host(), 0.5)
    images = images_for(smaller)
    export_onnx(smaller, tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, smaller(images).detach(), rtol=1e-4, atol=1e-4)
