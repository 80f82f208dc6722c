"""Feature maps of pruned models, for dense tasks: timm's functions, on full grids."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import pickle
import weakref

import pytest
import timm
import torch
from host_models import HOSTS, PRUNING, TINY, images_for, make_host, skip_unsuited, snapshot
from timm.models._features import FeatureGetterNet

from tokenprune_ext import methods
from tokenprune_ext.patch import TokenState
from tokenprune_ext.patch.timm_features import embed
from tokenprune_ext.prune import apply, remove, schedule_of, trace

from .test_identity import patch_everywhere

FEW = ("vit", "siglip", "dinov2_reg4", "deit_distilled")


def flat(result):
    """Every tensor in what a function returned, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts for tensor in flat(part)]


def same(first, second):
    first, second = flat(first), flat(second)
    return len(first) == len(second) and all(map(torch.equal, first, second))


def grids_by_hand(model, images):
    """Behind every block, all tokens ``[B, P + n0, C]``, patch by patch from the outputs of the blocks."""
    prefix, outputs = model.num_prefix_tokens, []
    embedded = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in model.blocks]
    hooks.append(model.blocks[0].register_forward_pre_hook(lambda *args: embedded.append(args[1][0])))
    sources = trace(model, images).sources
    for hook in hooks:
        hook.remove()
    latest, source, grids = embedded[0].clone(), None, []
    for index, output in enumerate(outputs):
        tokens = output.x if isinstance(output, TokenState) else output
        source = sources.get(index, source)
        latest = latest.clone()
        latest[:, :prefix] = tokens[:, :prefix]
        for image, patch in itertools.product(range(latest.shape[0]), range(latest.shape[1] - prefix)):
            place = patch if source is None else int(source[image, patch])
            if place >= 0:
                latest[image, prefix + patch] = tokens[image, prefix + place]
        grids.append(latest)
    return grids


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("method", PRUNING)
@torch.no_grad()
def test_every_patch_has_its_token_or_its_last_value(name, method):
    model = make_host(name)
    skip_unsuited(method, model)
    if method == "auto":
        method = "peaks"  # auto computes the class token alone in the last block, which has a test of its own
    apply(model, method, layers=[1, 2], keep=[11, 6])
    images = images_for(model)
    for norm in (False, True):
        final, maps = model.forward_intermediates(images, norm=norm, output_fmt="NLC", return_prefix_tokens=True)
        for found, grid in zip(maps, grids_by_hand(model, images), strict=True):
            patches, prefix = found if model.num_prefix_tokens else (found, grid[:, :0])
            expected = model.norm(grid) if norm else grid
            assert torch.equal(
                torch.cat([prefix if model.num_prefix_tokens else expected[:, :0], patches], 1), expected
            )
        assert torch.equal(final, model.forward_features(images))


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_nothing_pruned_is_the_dense_model(name):
    """With every argument, bit for bit, through the blocks taken apart."""
    model = make_host(name)
    images = images_for(model)
    has_dict = "output_dict" in inspect.signature(model.forward_intermediates).parameters
    calls = [
        {"indices": indices, "norm": norm, "stop_early": early, **form}
        for indices in (None, 2, [0, -1], [1])
        for norm, early in itertools.product((False, True), repeat=2)
        for form in (
            {},
            {"output_fmt": "NLC", "return_prefix_tokens": True},
            {"output_dict": True, "return_prefix_tokens": True},
            {"output_dict": True, "intermediates_only": True},
            {"intermediates_only": True, "return_prefix_tokens": True},
        )
        if has_dict or "output_dict" not in form
    ]
    layers = hasattr(model, "get_intermediate_layers") * [
        {"n": 2, "reshape": True},
        {"n": [1, 2], "return_prefix_tokens": True, "norm": True},
    ]
    dense = [model.forward_intermediates(images, **call) for call in calls]
    dense_layers = [model.get_intermediate_layers(images, **call) for call in layers]
    patch_everywhere(model)
    for call, expected in zip(calls, dense, strict=True):
        found = model.forward_intermediates(images, **call)
        assert same(found, expected), call
        assert type(found) is type(expected)
        if call.get("output_dict"):
            assert found.keys() == expected.keys()
    for call, expected in zip(layers, dense_layers, strict=True):
        assert same(model.get_intermediate_layers(images, **call), expected), call


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_base_patch16_clip_224", {}),
        ("eva02_base_patch16_clip_224", {}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("beit_base_patch16_224", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ],
)
@torch.no_grad()
def test_what_enters_the_blocks_of_every_family(name, options):
    if not timm.is_model(name):
        pytest.skip("this timm does not have it")
    model = timm.create_model(name, **TINY, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 64, 64)
    tokens, calls = embed(model, images)
    for block, call in zip(model.blocks, calls, strict=True):
        tokens = block(tokens, **call)
    assert torch.equal(model.norm(tokens), model.forward_features(images))


@torch.no_grad()
def test_class_token_only_gives_the_full_grid_too():
    model = make_host("vit")
    images = images_for(model)
    dense = model.forward_intermediates(images)
    apply(model, methods.create("dense", class_token_only=True))
    assert model.forward_features(images).shape[1] == 1
    assert same(model.forward_intermediates(images), dense)


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "tome", "ats"])
def test_arguments_of_a_pruned_model(method):
    model = apply(make_host("vit"), method, layers=[1, 2], keep=[11, 6])
    images = images_for(model)
    final, maps = model.forward_intermediates(images)
    assert [part.shape for part in maps] == [(2, 32, 4, 4)] * 4
    assert all(part.is_contiguous() for part in maps)
    assert same(model.forward_intermediates(images, indices=[1, -1], intermediates_only=True), [maps[1], maps[3]])
    rows = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
    assert same(rows, [maps[3].flatten(2).transpose(1, 2)])
    early, two = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert same(two, maps[:2])
    assert early.shape == (2, 12, 32)
    found = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert same(found["image_intermediates"], maps)
    assert [part.shape for part in found["image_intermediates_prefix"]] == [(2, 1, 32)] * 4
    assert torch.equal(found["image_features"], final)
    assert torch.equal(model.forward_head(final), model(images))
    assert same(model.get_intermediate_layers(images, n=[1, 3], reshape=True), [maps[1], maps[3]])
    normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
    assert same(normed, [model.norm(part.flatten(2).transpose(1, 2)) for part in maps])


@torch.no_grad()
@pytest.mark.parametrize("prune_first", [False, True])
def test_feature_getter(prune_first):
    if prune_first:
        model = apply(make_host("vit"), "topk", layers=[1], keep=0.5)
        net = FeatureGetterNet(model, out_indices=[0, 2], prune=False)
    else:
        net = FeatureGetterNet(make_host("vit"), out_indices=[0, 2])
        model = apply(net.model, "topk", layers=[1], keep=0.5)
        assert len(model.blocks) == 3
    images = images_for(model)
    assert same(net(images), model.forward_intermediates(images, indices=[0, 2], intermediates_only=True))
    dense = net(images)
    remove(net.model)
    assert torch.equal(net(images)[0], dense[0])
    assert not torch.equal(net(images)[1], dense[1])


@torch.no_grad()
def test_features_only_models():
    net = timm.create_model("test_vit", img_size=64, features_only=True, out_indices=(1, 3)).eval()
    images = torch.randn(2, 3, 64, 64)
    dense = net(images)
    apply(net.model, "tome", keep=0.75)
    pruned = net(images)
    assert [part.shape for part in pruned] == [part.shape for part in dense]
    assert not same(pruned, dense)


@torch.no_grad()
def test_images_of_another_size():
    model = timm.create_model("test_vit", img_size=64, dynamic_img_size=True).eval()
    model = apply(model, "topk", layers=[1], keep=0.5)
    maps = model.forward_intermediates(torch.randn(1, 3, 96, 64), intermediates_only=True)
    assert [part.shape[2:] for part in maps] == [(6, 4)] * len(model.blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model = apply(make_host("vit"), "tome", layers=[1, 2], keep=[11, 6]).train()
    images = images_for(model)
    gradients = []
    for checkpoint in (False, checkpointing):
        model.zero_grad()
        model.set_grad_checkpointing(checkpoint)
        maps = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        sum(part.square().sum() for part in maps).backward()
        gradients.append([parameter.grad for parameter in model.blocks.parameters()])
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("method", ["topk", "tome", "ats", "zero_tprune"])
def test_compile_without_graph_breaks(method):
    torch.compiler.reset()
    net = FeatureGetterNet(make_host("vit", depth=2), out_indices=[0, 1], prune=False)
    apply(net.model, method, layers=[0], keep=0.6)
    images = images_for(net.model)
    with torch.no_grad():
        for found, expected in zip(
            torch.compile(net, fullgraph=True, backend="aot_eager")(images), net(images), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_export_with_any_batch():
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = apply(make_host("vit", depth=2), "tome", layers=[0], keep=0.75)

        def forward(self, images):
            return self.model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)

    net = Features()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (images_for(net.model),), dynamic_shapes=({0: batch},)).module()
    images = images_for(net.model, batch=5, seed=1)
    for found, expected in zip(exported(images), net(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_stands_on_its_own(how):
    model = apply(make_host("vit"), "topk", keep=0.75)
    images = images_for(model)
    expected = model.forward_intermediates(images)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    gone = weakref.ref(model)
    gc.disable()
    del model
    assert gone() is None  # not even a cycle holds it
    gc.enable()
    assert same(twin.forward_intermediates(images), expected)
    assert type(remove(twin)) is type(make_host("vit"))


def test_the_model_changes_its_class_and_nothing_else():
    model = make_host("vit")
    kind, before = type(model), snapshot(model)
    apply(model, "topk", keep=1.0)
    assert type(model) is kind  # nothing is pruned
    apply(model, "topk", keep=0.5)
    assert isinstance(model, kind)
    assert set(vars(model)) - set(before[""][2]) == {"_tokenprune_record"}
    assert schedule_of(model).model == "vit_tiny_patch16_224"
    assert snapshot(remove(model)) == before


def test_what_does_not_work_says_so():
    model = apply(make_host("vit"), "topk", keep=0.5)
    images = images_for(model)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match="attn_mask and is_causal do not work on a pruned model"):
        model.forward_intermediates(images, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="attn_mask and is_causal do not work on a pruned model"):
        model.forward_intermediates(images, is_causal=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fill'"):
        model.forward_intermediates(images, fill=0)
    for cut in (model.prune_intermediate_layers, lambda: FeatureGetterNet(model)):
        with pytest.raises(ValueError, match=r"before tokenprune_ext\.apply, or give FeatureGetterNet prune=False"):
            cut()


@pytest.mark.parametrize("name", ["eva02", "beit"])
def test_rotary_and_biased_families(name):
    """Every block taken apart gives the dense maps bit for bit; a pruned model gives maps of the same shapes."""
    model = make_host(name)
    images = images_for(model)
    dense = model.forward_intermediates(images)
    patch_everywhere(model)
    assert same(model.forward_intermediates(images), dense)
    apply(remove(model), "topk", layers=[1], keep=0.5)
    tokens, maps = model.forward_intermediates(images)
    assert tokens.shape[1] < dense[0].shape[1]
    assert [part.shape for part in maps] == [part.shape for part in dense[1]]
    assert torch.equal(maps[0], dense[1][0])
    assert not torch.equal(maps[1], dense[1][1])
