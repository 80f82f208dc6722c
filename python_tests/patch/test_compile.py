"""torch.compile without graph breaks, and torch.export."""

from __future__ import annotations

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext.patch.sources import recording
from tokenprune_ext.prune import apply, remove

METHODS = ("pomt", "random", "topk", "zero_tprune")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "method"), [*(("vit", method) for method in METHODS), ("siglip", "topk"), ("dinov2_reg4", "zero_tprune")]
)
def test_compile_without_graph_breaks(name, method):
    model = apply(make_host(name, depth=2), method, layers=[0], keep=0.6)
    images = images_for(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, model(images), rtol=1e-5, atol=1e-5)


def test_a_compiled_forward_records_nothing():
    model = apply(make_host("vit", depth=2), "topk", layers=[0], keep=0.6)
    with recording() as found:
        torch.compile(model, fullgraph=True, backend="eager")(images_for(model))
        assert found.sources == found.scores == {}


def test_compiled_training():
    model = apply(make_host("vit", depth=2), "pomt", layers=[0], keep=0.6)
    images = images_for(model)
    model(images).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_inductor():
    model = apply(make_host("vit", depth=1), "zero_tprune", layers=[0], keep=0.6)
    images = images_for(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(compiled, model(images), rtol=1e-4, atol=1e-4)


def test_patching_a_model_that_is_compiled_in_place():
    model = make_host("vit", depth=2)
    images = images_for(model)
    with torch.no_grad():
        dense = model(images)
        model.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(images), dense)
        apply(model, "topk", layers=[1], keep=0.5)
        pruned = apply(make_host("vit", depth=2), "topk", layers=[1], keep=0.5)(images)
        torch.testing.assert_close(model(images), pruned)
        apply(model, "topk", layers=[1], keep=0.25)
        pruned = apply(make_host("vit", depth=2), "topk", layers=[1], keep=0.25)(images)
        torch.testing.assert_close(model(images), pruned)
        torch.testing.assert_close(remove(model)(images), dense)


@pytest.mark.parametrize("method", METHODS)
def test_export_with_any_batch(method):
    model = apply(make_host("vit", depth=2), method, layers=[1], keep=0.6)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images_for(model),), dynamic_shapes=({0: batch},)).module()
    images = images_for(model, batch=5, seed=1)
    torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)
