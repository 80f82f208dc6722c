"""Pruned models with quantised or cast weights: in either order, and exact where the dense model is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from host_models import PRUNING, images_for, logits, make_host, shared_host, skip_unsuited
from torch import nn

import tokenprune_ext as tokenprune
from tokenprune_ext.checkpoint import save
from tokenprune_ext.loading import ModelError
from tokenprune_ext.methods import Dense
from tokenprune_ext.patch import BlockPlan, UnsupportedModelError, adapter_of, inspect_host, install

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
HOSTS = (
    "deit_distilled",
    "siglip",
    "qk_norm",
    "dinov3",
    "rope_axial",
    "sapiens2_gqa",
    "hf_vit",
    "hf_clip",
    "hf_dinov2",
)
SEPARATE_BIAS = ("eva02_fused", "beit")  # their forward multiplies by qkv.weight itself


def _torchao(model: nn.Module, config: str, **options: object) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)(), **options)
    return model


def dynamic(model: nn.Module, **options: object) -> nn.Module:
    return _torchao(model, "Int8DynamicActivationInt8WeightConfig", **options)


def weight_only(model: nn.Module, **options: object) -> nn.Module:
    return _torchao(model, "Int8WeightOnlyConfig", **options)


def torch_ao(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


Quantiser = Callable[[nn.Module], nn.Module]
both = pytest.mark.parametrize("quantise", [dynamic, weight_only])
all_three = pytest.mark.parametrize("quantise", [dynamic, weight_only, torch_ao])


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, images_for(model))


def near(found: torch.Tensor, expected: torch.Tensor, share: float = 0.05) -> bool:
    """A difference in the last bit can move an activation to the next step of its 8 bits, and choose another token."""
    return bool((found - expected).abs().mean() < share * expected.abs().mean())


def check_both_orders(host: str, method: str, quantise: Quantiser) -> None:
    dense = shared_host(host)
    skip_unsuited(method, dense)
    quantised = quantise(copy.deepcopy(dense))
    before = outputs(quantised)
    first = tokenprune.apply(copy.deepcopy(quantised), method, macs=0.8)
    pruned = tokenprune.apply(copy.deepcopy(dense), method, macs=0.8)
    second = quantise(copy.deepcopy(pruned))
    assert tokenprune.describe(first) == tokenprune.describe(second) == tokenprune.describe(pruned)
    assert tokenprune.schedule_of(first) == tokenprune.schedule_of(second) == tokenprune.schedule_of(pruned)
    found = outputs(first)
    assert not torch.equal(found, before)
    assert not torch.equal(found, outputs(pruned))
    assert torch.equal(outputs(second), found)
    with torch.inference_mode():
        assert torch.equal(logits(first, images_for(first)), found)
    assert near(logits(first, images_for(first)).detach(), found)  # with gradients on, torch takes other kernels
    assert torch.equal(outputs(copy.deepcopy(second)), found)
    for model in (first, second):
        assert torch.equal(outputs(tokenprune.remove(model)), before)


@all_three
@pytest.mark.parametrize("method", PRUNING)
def test_every_method(method: str, quantise: Quantiser) -> None:
    check_both_orders("vit", method, quantise)


@all_three
@pytest.mark.parametrize("host", HOSTS)
def test_every_kind_of_host(host: str, quantise: Quantiser) -> None:
    check_both_orders(host, "peaks", quantise)


@all_three
@pytest.mark.parametrize("host", ["vit", *HOSTS])
def test_keeping_everything_is_exact(host: str, quantise: Quantiser) -> None:
    model = quantise(make_host(host))
    expected = outputs(model)
    geometry, adapter = inspect_host(model), adapter_of(model)
    patches = geometry.num_patches
    install(
        model,
        {layer: BlockPlan(adapter, geometry, Dense(), layer, patches, patches) for layer in range(geometry.depth)},
        "record",
    )
    assert torch.equal(outputs(model), expected)


@both
@pytest.mark.parametrize("host", ["vit", "deit_distilled", "hf_vit"])
def test_the_class_token_alone(host: str, quantise: Quantiser) -> None:
    """torch.ao is left out: it has one scale for all activations, so that fewer tokens change the others."""
    model = quantise(make_host(host))
    expected = outputs(model)
    tokenprune.apply(model, Dense(class_token_only=True))
    with torch.inference_mode():
        assert near(logits(model, images_for(model)), expected, 0.01)


@pytest.mark.parametrize("host", SEPARATE_BIAS)
@all_three
def test_layers_that_cannot_be_quantised(host: str, quantise: Quantiser) -> None:
    """The dense model does not run either; with these layers as they are, all is well."""
    model = quantise(make_host(host))
    with pytest.raises((IndexError, TypeError)):
        model(images_for(model))
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.attn.qkv is not supported: .* leave it as it is"):
        tokenprune.apply(model, "topk", keep=0.8)


@pytest.mark.parametrize("host", SEPARATE_BIAS)
@both
def test_all_other_layers_of_such_a_model(host: str, quantise: Callable[..., nn.Module]) -> None:
    check_both_orders(
        host, "peaks", lambda m: quantise(m, filter_fn=lambda part, name: type(part) is nn.Linear and "qkv" not in name)
    )


@both
def test_compiled_as_one_graph(quantise: Quantiser) -> None:
    model = tokenprune.apply(quantise(make_host("vit")), "auto", macs=0.7)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert near(compiled(images_for(model)), outputs(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PRUNING)
def test_autocast(method: str, dtype: torch.dtype) -> None:
    dense = shared_host("vit")
    model = tokenprune.apply(copy.deepcopy(dense), method, macs=0.8)
    with torch.autocast("cpu", dtype):
        found, expected = outputs(model), outputs(dense)
    assert found.dtype == expected.dtype == dtype
    assert near(found, outputs(model), 0.2)


@both
@pytest.mark.parametrize("method", ["auto", "tome"])
def test_quantised_under_autocast(method: str, quantise: Quantiser) -> None:
    model = tokenprune.apply(quantise(make_host("vit")), method, macs=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model)
    assert near(found, outputs(model), 0.2)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantised_half_precision(quantise: Quantiser, dtype: torch.dtype) -> None:
    model = tokenprune.apply(make_host("vit", dtype), "auto", macs=0.7)
    whole = outputs(model)
    found = outputs(quantise(model))
    assert found.dtype == dtype
    assert not torch.equal(found, whole)
    assert near(found, whole, 0.2)


@both
def test_saving_is_refused(quantise: Quantiser, tmp_path) -> None:
    model = quantise(tokenprune.apply(make_host("vit"), "topk", keep=0.8))
    with pytest.raises(ModelError, match=r"qkv.weight is no plain tensor .*Int8Tensor.*saved before it is quantised"):
        save(model, tmp_path / "model.safetensors")
