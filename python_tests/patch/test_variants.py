"""Every method and reduction in a whole model: under autocast, with gradients, with no images."""

from __future__ import annotations

import pytest
import torch
from host_models import PRUNING, images_for, make_host

from tokenprune_ext import methods
from tokenprune_ext.prune import apply

VARIANTS = {
    **{name: methods.create(name) for name in PRUNING},
    **{f"topk {how}": methods.create("topk", reduction=how) for how in ("mean", "weighted", "sum", "merge")},
    **{f"peaks {source}": methods.create("peaks", importance=source) for source in ("received", "wpr", "norm")},
    **{
        f"zero_tprune {feature}": methods.create("zero_tprune", feature=feature, reduction="merge", mid_block=True)
        for feature in ("key_heads", "hidden")
    },
    "tome drop": methods.create("tome", reduction="drop"),
    "peaks class token": methods.create("peaks", class_token_only=True),
}


def pruned(variant, **options):
    return apply(make_host("vit", **options), VARIANTS[variant], layers=[0, 1, 2], keep=[12, 8, 5])


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    """The arithmetic is bfloat16, the residual stream stays float32, and the result stays near."""
    model = pruned(variant)
    images = images_for(model)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            near = model(images)
    assert near.dtype == torch.bfloat16
    assert near.isfinite().all()
    # Other tokens may be chosen where scores are close; most of the output does not know.
    assert (near.float() - exact).abs().mean() < 0.25 * exact.abs().mean()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients(variant, autocast):
    """Every weight and every pixel of a token that counts gets one."""
    model = pruned(variant)
    images = images_for(model).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].name != "random"])
def test_gradients_are_those_of_the_function(variant):
    """With the choice of tokens held, which a small step does: the slope along a random direction."""
    model = pruned(variant).double()
    images = images_for(model).double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images.requires_grad_()
    value = model(images).square().sum()
    slope = (torch.autograd.grad(value, images)[0] * direction).sum()
    step = 1e-6
    with torch.no_grad():
        ends = [model(images + sign * step * direction).square().sum() for sign in (1, -1)]
    reduction = getattr(VARIANTS[variant], "reduction", "drop")
    if reduction not in ("weighted", "sum"):  # there the scores are weights, and count as constants
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_no_images(variant, dtype):
    model = pruned(variant).to(dtype)
    images = images_for(model)
    with torch.no_grad():
        assert model(images).dtype == dtype
        assert model(images).isfinite().all()
        assert model(images[:0]).shape == (0, 10)
