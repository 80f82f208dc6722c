"""torch.compile without graph breaks, and torch.export."""

from __future__ import annotations

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext import methods
from tokenprune_ext.patch.sources import recording
from tokenprune_ext.prune import apply, remove

# Ways through the methods that no default takes; the defaults are in test_deploy.py.
VARIANTS = {
    "evit weighted": methods.create("evit", reduction="weighted"),
    "zero_tprune merge": methods.create("zero_tprune", reduction="merge", partition="random", feature="key_heads"),
}


def pruned(name, variant):
    """Two layers prune and hand on what they made of the tokens to a third."""
    return apply(make_host(name, depth=3), VARIANTS.get(variant, variant), layers=[0, 1], keep=[11, 7])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "variant"), [*(("vit", name) for name in VARIANTS), ("dinov2_reg4", "tome"), ("rope_mixed", "auto")]
)
def test_compile_without_graph_breaks(name, variant):
    model = pruned(name, variant)
    images = images_for(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, model(images), rtol=1e-5, atol=1e-5)


def test_a_compiled_forward_records_nothing():
    model = apply(make_host("vit", depth=2), "topk", layers=[0], keep=0.6)
    with recording() as found:
        torch.compile(model, fullgraph=True, backend="eager")(images_for(model))
        assert found.sources == found.scores == {}


@pytest.mark.parametrize("method", ["pomt", "peaks"])
def test_compiled_training(method):
    model = apply(make_host("vit", depth=2), method, layers=[0], keep=0.6)
    images = images_for(model)
    model(images).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor(mode):
    model = apply(make_host("vit", depth=2), methods.create("zero_tprune", reduction="merge"), layers=[0], keep=0.6)
    images = images_for(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode=mode)(images)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_with_any_batch(variant):
    model = pruned("vit", variant)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images_for(model),), dynamic_shapes=({0: batch},)).module()
    images = images_for(model, batch=5, seed=1)
    torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)
