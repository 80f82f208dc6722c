"""Images of another size than the schedule was made for, on models that take them."""

from __future__ import annotations

import pytest
import torch
from host_models import PRUNING, images_for, logits, make_host, skip_unsuited, tokens_behind_blocks

from tokenprune_ext.patch import inspect_host
from tokenprune_ext.prune import apply, remove, schedule_of, trace

KEEP = {1: 12, 2: 7}
HOSTS = ("vit", "dinov2_reg4", "eva02_clip", "rope_mixed", "dinov3", "rope_reg1_gap")


def images(model, height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def scaled(patches):
    counts = {}
    entering = patches
    for layer, (before, after) in zip(KEEP, ((16, 12), (12, 7)), strict=True):
        counts[layer] = entering = entering * after // before
    return counts


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (8, 2), (6, 5), (1, 3)])
@pytest.mark.parametrize("method", ["topk", "pomt", "peaks"])
@pytest.mark.parametrize("name", HOSTS)
def test_counts_follow_the_image(name, method, rows, columns):
    """The same as a model that is set to the size, with the scaled counts."""
    dynamic, fixed = make_host(name, dynamic_img_size=True), make_host(name, dynamic_img_size=False)
    assert inspect_host(dynamic).dynamic
    apply(dynamic, method, layers=list(KEEP), keep=list(KEEP.values()))
    side = dynamic.patch_embed.patch_size[0]
    pictures = images(dynamic, rows * side, columns * side)
    fixed.set_input_size((rows * side, columns * side))
    counts = scaled(rows * columns)
    counts = {layer: max(count, 2 if method == "pomt" else 1) for layer, count in counts.items()}
    apply(fixed, method, layers=list(counts), keep=list(counts.values()))
    with torch.no_grad():
        torch.testing.assert_close(logits(dynamic, pictures), logits(fixed, pictures), rtol=1e-4, atol=1e-4)
    assert logits(dynamic, images_for(dynamic)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("name", ["vit", "dinov3"])
@pytest.mark.parametrize("method", PRUNING)
def test_every_method_takes_any_size(name, method, rows):
    """Counts stay within what the method can do, however few patches there are."""
    model = make_host(name, dynamic_img_size=True)
    skip_unsuited(method, model)
    apply(model, method, keep=0.55)
    assert logits(model, images(model, 16 * rows, 16)).isfinite().all()
    assert logits(model, images(model, 16 * rows, 48)).isfinite().all()


def test_transformers_models_take_any_size():
    for name, options in {"hf_dinov2": {}, "hf_dinov3_bare": {}, "hf_vit": {"interpolate_pos_encoding": True}}.items():
        model = make_host(name)
        apply(model, "tome", layers=[0, 1], keep=[12, 9])
        prefix = inspect_host(model).num_prefix_tokens
        assert tokens_behind_blocks(model, images(model, 96, 64), **options)[:2] == [prefix + 18, prefix + 13]


def test_a_trace_of_another_size():
    model = apply(make_host("dinov3", dynamic_img_size=True), "pomt", layers=[1], keep=[8])
    traced = trace(model, images(model, 96, 32))
    assert traced.sources[1].shape == (2, 12)
    assert traced.sources[1].max() == 5
    assert schedule_of(model).keep == {1: 8}
    assert logits(remove(model), images(model, 96, 32)).isfinite().all()


def test_a_fixed_size_stays_fixed():
    model = apply(make_host("vit"), "pomt", layers=[1], keep=[8])
    model.patch_embed.strict_img_size = False
    with pytest.raises(ValueError, match=r"block 1 got 26 tokens and expects 17 .* 64 x 64"):
        model.blocks[1](torch.randn(1, 26, 32))
