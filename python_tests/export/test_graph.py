"""Every family of models as one graph, for any batch size; the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from host_models import images_for, logits, make_host
from torch import nn

from tokenprune_ext.export.graph import captured, example_images
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply

# Beside those of test_deploy.py.
FAMILIES = ("dinov2_reg4", "rope_mixed", "hf_deit", "hf_dinov2_reg", "hf_dinov3_bare", "hf_siglip_bare")


def check(model: nn.Module, **options) -> None:
    program = captured(model, **options).module()
    for batch in (1, 5):
        images = images_for(model, batch, seed=1)
        torch.testing.assert_close(logits(program, images), logits(model, images), rtol=1e-5, atol=1e-5)


def test_dense():
    check(make_host("vit", depth=2))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["auto", "zero_tprune"])
def test_every_family(name, method):
    check(apply(make_host(name), method, layers=[0, 1], keep=0.7))


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_the_model_stays_as_it_was(name):
    model = apply(make_host(name), "auto", keep=0.7)
    parts = {name: (part, type(part), dict(vars(part))) for name, part in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    captured(model)
    for name, part in model.named_modules():
        assert (part, type(part), vars(part)) == parts[name]  # torch.export puts equal lists in the place of lists
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_given_batch():
    model = make_host("vit", depth=2)
    program = captured(model, batch=1).module()
    assert program(images_for(model, 1)).shape == (1, 10)
    with pytest.raises((AssertionError, RuntimeError)):
        program(images_for(model, 2))


def test_images_of_another_size():
    model = apply(make_host("rope_axial", dynamic_img_size=True), "topk", keep=0.7)
    images = torch.randn(3, 3, 96, 64)
    program = captured(model, images[:1]).module()
    torch.testing.assert_close(program(images), model(images))


def test_transformers_makes_masks_again_and_refuses_real_ones():
    masking = pytest.importorskip("transformers.masking_utils")
    makers = dict(masking.ALL_MASK_ATTENTION_FUNCTIONS)
    model = apply(make_host("hf_vit"), "topk", keep=0.7)
    captured(model)
    assert dict(masking.ALL_MASK_ATTENTION_FUNCTIONS) == makers
    with pytest.raises(ValueError, match=r"attention_mask does .*: the tokens it speaks of are gone; export the"):
        torch.export.export(model, (images_for(model),))


def test_bad_input():
    model = make_host("vit", depth=2)
    with pytest.raises(ValueError, match=r"eval mode to be exported: call model.eval\(\)"):
        captured(model.train())
    model.eval()
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        captured(model, batch=0)
    with pytest.raises(TypeError, match="batch must be an int"):
        captured(model, batch=2.0)
    for shape in ((3, 64, 64), (0, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must have shape \[B, C, H, W\] with B from 1 on"):
            captured(model, torch.zeros(shape))
    with pytest.raises(UnsupportedModelError):
        captured(nn.Linear(2, 2))


def test_example_images_go_with_the_model():
    model = make_host("vit", torch.bfloat16, depth=2)
    images = example_images(model, 3)
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, example_images(model, 3))
