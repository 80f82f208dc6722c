"""Gates go into a model and out of it without a trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from host_models import HAS_GATE, HAS_SCALE_NORM, PRUNING, make_host, skip_unsuited, snapshot
from vtp.gated_models import VTP_HOSTS, gated_host, images_for

from tokenprune_ext import UnsupportedModelError, apply, remove, vtp

PLACES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("name", VTP_HOSTS)
def test_in_and_out(name):
    model = make_host(name)
    images, before, state = images_for(model), snapshot(model), model.state_dict()
    dense = model(images)
    assert vtp.add_gates(model) is model
    assert torch.equal(model(images), dense)
    added = model.state_dict().keys() - state.keys()
    assert added == {f"blocks.{i}.{place}.gate" for i in range(len(model.blocks)) for place in PLACES}
    with torch.no_grad():
        model.blocks[1].mlp.fc2.gate[0] = 0
    assert not torch.equal(model(images), dense)
    assert vtp.remove_gates(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(images), dense)


def test_a_gate_multiplies_the_input_of_its_layer():
    model = gated_host()
    for place in PLACES:
        linear = model.blocks[0].get_submodule(place)
        x = torch.randn(3, linear.in_features)
        expected = torch.nn.functional.linear(x * linear.gate, linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), expected)


def test_penalty_is_the_sum_of_absolute_values():
    model = gated_host()
    expected = sum(float(gate.abs().sum()) for gate in vtp.gates_of(model).values())
    loss = vtp.penalty(model)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    for gate in vtp.gates_of(model).values():
        assert torch.equal(gate.grad, gate.detach().sign())
    with pytest.raises(ValueError, match="no gates"):
        vtp.penalty(make_host("deit"))


def test_sparsity_training_reaches_gates_and_weights():
    model = gated_host("dropout").train()
    loss = model(images_for(model)).square().mean() + vtp.LAMBDA * vtp.penalty(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_copies_keep_the_gates():
    model = gated_host()
    images = images_for(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))
        assert vtp.gates_of(other).keys() == vtp.gates_of(model).keys()
        vtp.remove_gates(other)
        assert vtp.gates_of(model)
        assert not vtp.gates_of(other)


def test_state_dict_comes_back():
    model, other = gated_host(), vtp.add_gates(make_host("deit"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images_for(model)), model(images_for(model)))


def test_autocast_and_half():
    model = gated_host()
    images = images_for(model)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), exact, rtol=0.1, atol=0.2)
    model.bfloat16()
    assert {gate.dtype for gate in vtp.gates_of(model).values()} == {torch.bfloat16}
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_compiles_without_graph_breaks():
    model = gated_host()
    images = images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
    assert len(vtp.gates_of(compiled)) == 4 * len(model.blocks)
    assert torch.equal(vtp.penalty(compiled), vtp.penalty(model))


@pytest.mark.parametrize("method", PRUNING)
def test_tokens_can_go_while_gates_train(method):
    model = gated_host().train()
    skip_unsuited(method, model)
    apply(model, method, macs=0.8)
    model(images_for(model)).square().mean().backward()
    assert all(gate.grad is not None for gate in vtp.gates_of(model).values())
    vtp.remove_gates(model)
    remove(model)
    assert snapshot(model).keys() == snapshot(make_host("deit")).keys()


def test_twice_is_an_error():
    model = gated_host()
    before = snapshot(model)
    with pytest.raises(ValueError, match="has gates already"):
        vtp.add_gates(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva", "Eva"),
        ("beit", "Beit"),
        ("dinov2_swiglu", "blocks.0.mlp"),
        pytest.param("scale_norm", "blocks.0.attn.norm", marks=pytest.mark.skipif(not HAS_SCALE_NORM, reason="timm")),
        pytest.param("gated", "blocks.0.attn.gate", marks=pytest.mark.skipif(not HAS_GATE, reason="timm")),
    ],
)
def test_other_models_are_refused_by_name(name, part):
    model = make_host(name)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=part):
        vtp.add_gates(model)
    assert snapshot(model) == before


def test_other_layers_are_refused_by_name():
    class Adapter(torch.nn.Linear):
        pass

    model = make_host("deit")
    model.blocks[2].mlp.fc1.__class__ = Adapter
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.mlp\.fc1.*Adapter"):
        vtp.add_gates(model)
    with pytest.raises(UnsupportedModelError, match="Linear is not supported"):
        vtp.add_gates(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="lost channels already"):
        vtp.add_gates(vtp.prune(gated_host(), 0.5))
