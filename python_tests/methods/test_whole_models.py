"""Pruned models against slow ones: every block of every method, source maps and sizes, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from host_models import images_for, make_host
from methods.slow_methods import Pruned, ats, reduce_tokens, tome, zero_tprune
from methods.slow_scores import Image, attention, peaks_scores, pomt_scores, topk_scores
from torch import Tensor, nn

from tokenprune_ext import methods
from tokenprune_ext.patch import TokenState
from tokenprune_ext.prune import apply, describe, remove, trace

Prune = Callable[[Image, int, int], Pruned]  # image, keep, layer


def rows(tensor: Tensor) -> list:
    return tensor.tolist()


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow_forward(
    model: nn.Module, pixels: Tensor, keep: dict[int, int], prune: Prune, behind: bool = False, log_size: bool = True
) -> tuple[Tensor, dict[int, list[int]]]:
    """Logits of one image, and the source map behind every pruning layer.

    Args:
        behind: tokens leave behind a block and not between attention and MLP.
        log_size: a token counts in attention as often as the patches it stands for.
    """
    x = rows(model.norm_pre(model._pos_embed(model.patch_embed(pixels[None])))[0])
    prefix = model.num_prefix_tokens
    sizes = [1.0] * len(x)
    source = list(range(len(x) - prefix))
    sources = {}
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        normed, width = block.norm1(tensor(x)), attn.proj.in_features // attn.num_heads
        q, k, v = attn.qkv(normed).view(len(x), 3, attn.num_heads, width).permute(1, 2, 0, 3)
        bias = [math.log(size) if size else -math.inf for size in sizes] if log_size else [0.0] * len(x)
        image = Image(
            x=x,
            q=rows(attn.q_norm(q)),
            k=rows(attn.k_norm(k)),
            v=rows(v),
            scale=attn.scale,
            prefix=prefix,
            has_class=model.cls_token is not None,
            size=sizes,
            bias=[[bias] * len(x)] * attn.num_heads,
        )
        heads = [tensor(attention(image, head)) @ v[head] for head in image.heads]
        image.x = rows(tensor(x) + block.ls1(attn.proj(torch.cat(heads, 1))))
        if behind:
            image.x = rows(tensor(image.x) + block.ls2(block.mlp(block.norm2(tensor(image.x)))))
        x = image.x
        if layer in keep:
            pruned = prune(image, keep[layer], layer)
            source = [landing(pruned, image, patch) if patch >= 0 else -1 for patch in source]
            sources[layer] = source
            x, sizes = pruned.x, pruned.size or [1.0] * len(pruned.x)
        if not behind:
            x = rows(tensor(x) + block.ls2(block.mlp(block.norm2(tensor(x)))))
    return model.forward_head(model.norm(tensor(x)[None]))[0], sources


def landing(pruned: Pruned, image: Image, patch: int) -> int:
    """Where the patch token at this place is among those that leave; -1 for nowhere."""
    token = patch + image.prefix
    if pruned.into and token in pruned.into:
        token = pruned.into[token]
    if token not in pruned.kept:
        return len(pruned.kept) if pruned.fused else -1
    place = pruned.kept.index(token)
    return place if pruned.size is None or pruned.size[image.prefix + place] else -1


def scored(scores: Callable[[Image], dict[int, float]], reduction: str) -> Prune:
    return lambda image, keep, layer: reduce_tokens(image, scores(image), keep, reduction)


def slow_peaks(image: Image, keep: int, layer: int) -> Pruned:
    scores = peaks_scores(image, "class" if image.has_class else "received")
    return reduce_tokens(image, scores, keep, "merge")


def slow_zero_tprune(image: Image, keep: int, layer: int, **options: object) -> Pruned:
    start = "class" if image.has_class else "uniform"
    return zero_tprune(image, keep, {0: 30, 3: 1}.get(layer, 5), start=start, tol=1e-6, **options)


CASES: dict[str, tuple[dict[str, object], Prune]] = {
    "topk": ({}, scored(topk_scores, "drop")),
    "topk merge": ({"reduction": "merge"}, scored(topk_scores, "merge")),
    "evit": ({}, scored(topk_scores, "sum")),
    "evit weighted": ({"reduction": "weighted"}, scored(topk_scores, "weighted")),
    "pomt": ({}, scored(pomt_scores, "mean")),
    "pomt merge": ({"reduction": "merge", "proportional": False}, scored(pomt_scores, "merge")),
    "peaks": ({}, slow_peaks),
    "tome": ({}, lambda image, keep, layer: tome(image, keep)),
    "tome unproportional": ({"proportional": False}, lambda image, keep, layer: tome(image, keep)),
    "tome drop": ({"reduction": "drop"}, lambda image, keep, layer: tome(image, keep, merges=False)),
    "ats": ({}, lambda image, keep, layer: ats(image, keep)),
    "zero_tprune": ({}, slow_zero_tprune),
    "zero_tprune merge": ({"reduction": "merge", "similar": 2}, partial(slow_zero_tprune, merges=True, similar=2)),
    "zero_tprune mid-block": (
        {"reduction": "merge", "mid_block": True, "tau": 0.5},
        partial(slow_zero_tprune, merges=True, tau=0.5),
    ),
}
HOSTS = [("vit", False), ("vit", True), ("deit_distilled", True), ("dinov2_reg4", False), ("siglip", False)]
KEEP = {0: 13, 1: 9, 2: 5}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("host", "class_token_only"), HOSTS)
def test_models_prune_as_slow_ones_do(case, host, class_token_only):
    """The slow model always computes the whole last block: the class token alone gives the same."""
    options, prune = CASES[case]
    method = methods.create(case.split()[0], class_token_only=class_token_only, **options)
    model = make_host(host, torch.float64)
    if method.name == "ats" and host == "siglip":
        pytest.skip("ats needs a class token")
    images = images_for(model)
    log_size = getattr(method, "proportional", True)  # sizes of 1 have no weight
    with torch.no_grad():
        slow = [slow_forward(model, image, KEEP, prune, method.where == "block", log_size) for image in images]
        apply(model, method, layers=list(KEEP), keep=list(KEEP.values()))
        traced = trace(model, images)
    for image, (logits, sources) in enumerate(slow):
        torch.testing.assert_close(traced.output[image], logits, rtol=1e-8, atol=1e-10)
        assert {layer: source[image].tolist() for layer, source in traced.sources.items()} == sources
    if class_token_only:
        assert describe(model).layers[3].tokens_out == model.num_prefix_tokens


MERGING = {
    "tome": {},
    "peaks": {},
    "topk": {"reduction": "merge"},
    "pomt": {"reduction": "merge", "proportional": False},
    "random": {"reduction": "merge"},
    "zero_tprune": {"reduction": "merge"},
}


@pytest.mark.parametrize("name", MERGING)
def test_merging_loses_no_patch(name):
    """Sizes are the numbers of patches that the source map says, and add up to all of them."""
    model = make_host("dinov2_reg4")
    apply(model, methods.create(name, **MERGING[name]), layers=[0, 1, 2], keep=[12, 7, 4])
    states: dict[int, TokenState] = {}
    for layer, block in enumerate(model.blocks[:3]):
        block.register_forward_hook(lambda *args, layer=layer: states.update({layer: args[2]}))
    images = images_for(model, batch=3)
    sources = trace(model, images).sources
    prefix = model.num_prefix_tokens
    for layer, keep in enumerate((12, 7, 4)):
        state, source = states[layer], sources[layer]
        assert state.x.shape[1] == prefix + keep
        assert (source >= 0).all()
        members = torch.stack([torch.bincount(row, minlength=keep) for row in source])
        assert torch.equal(state.size[:, prefix:], members.float())
        assert (state.size[:, :prefix] == 1).all()
        assert state.size.sum(1).tolist() == [prefix + 16] * 3
        if name == "pomt":
            assert state.bias is None
        else:
            torch.testing.assert_close(state.bias[:, 0, 0], state.size.log())


def repeating(model: nn.Module, distinct: int) -> Tensor:
    """Two images of 4 x 4 patches, of which only so many in a row of 16 are different: neighbours repeat."""
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
    patches = torch.randn(2, distinct, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    patches = patches.repeat_interleave(16 // distinct, 1).unflatten(1, (4, 4))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("class_token_only", [False, True])
@pytest.mark.parametrize(
    ("name", "distinct", "layers", "keep"),
    [("tome", 8, [0], [8]), ("tome", 4, [0, 2], [8, 4]), ("peaks", 8, [1], [8]), ("peaks", 4, [0], [4])],
)
def test_merging_identical_tokens_changes_nothing(name, distinct, layers, keep, class_token_only, fused):
    """A token of size m is m equal tokens, for the output and for the gradient of every weight."""
    model = make_host("vit", torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = repeating(model, distinct)
    dense = model(images)
    wanted = torch.autograd.grad(dense.square().sum(), list(model.parameters()))
    apply(model, methods.create(name, class_token_only=class_token_only), layers=layers, keep=keep)
    pruned = model(images)
    torch.testing.assert_close(pruned, dense, rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(pruned.square().sum(), list(model.parameters()))
    for (parameter, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        if parameter != "pos_embed":  # repeated patches stay repeated whatever the weights, not whatever is added
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=parameter)
    apply(model, methods.create(name, proportional=False), layers=layers, keep=keep)
    assert not torch.allclose(model(images), dense, rtol=1e-4)  # it is the log-size that does it
    assert torch.equal(remove(model)(images), dense)
