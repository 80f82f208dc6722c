"""Source maps: for every original patch, the token that stands for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from host_models import images_for, make_host
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_ext.patch import Reduced
from tokenprune_ext.patch.sources import compose, landing_positions, recording
from tokenprune_ext.prune import apply, trace

METHODS = ("pomt", "random", "topk", "zero_tprune")


@dataclass(frozen=True)
class Step:
    """What one layer does to one image: positions it keeps, where the others go, which kept ones are padding."""

    kept: list[int]
    into: dict[int, int] | None
    fused: bool
    padding: set[int]


def follow(num_patches, steps):
    """The map of one image by carrying the original patch numbers of every token along, in lists."""
    tokens = [[patch] for patch in range(num_patches)]
    for step in steps:
        lost = [position for position in range(len(tokens)) if position not in step.kept]
        for position in lost if step.into else ():
            tokens[step.into[position]] += tokens[position]
        fused = [[patch for position in lost for patch in tokens[position]]] if step.fused else []
        tokens = [[] if position in step.padding else tokens[position] for position in step.kept] + fused
    positions = [-1] * num_patches
    for position, patches in enumerate(tokens):
        for patch in patches:
            positions[patch] = position
    return positions


@st.composite
def reductions(draw):
    """Patch count, and per layer what happens to each of two images; the same kind of thing to both."""
    num_patches = alive = draw(st.integers(2, 12))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, alive))
        kind = draw(st.sampled_from(["drop", "fuse", "merge", "pad"]))
        steps = []
        for _ in range(2):
            order = draw(st.permutations(range(alive)))
            kept, lost = sorted(order[:count]), order[count:]
            into = {position: draw(st.sampled_from(kept)) for position in lost} if kind == "merge" else None
            padding = set(draw(st.lists(st.sampled_from(kept)))) if kind == "pad" else set()
            steps.append(Step(kept, into, kind == "fuse" and count < alive, padding))
        layers.append(steps)
        alive = count + steps[0].fused
    return num_patches, layers


def reduced_by(steps, prefix, alive):
    """What a layer hands on that does these steps to the images of a batch."""
    kept = torch.tensor([step.kept for step in steps]) + prefix
    size = into = None
    if any(step.padding for step in steps):
        size = torch.tensor([[1] * prefix + [position not in step.padding for position in step.kept] for step in steps])
    if steps[0].into is not None:
        table = torch.full((2, prefix + alive), -1)
        for image, step in enumerate(steps):
            for source, target in step.into.items():
                table[image, prefix + source] = prefix + target
        into = table
    return Reduced(torch.empty(0), kept, steps[0].fused, size, None if into is None else lambda: into)


@settings(max_examples=100, deadline=None)
@given(reductions(), st.integers(0, 2))
def test_composed_maps_against_lists(case, prefix):
    num_patches, layers = case
    source, alive = None, num_patches
    for steps in layers:
        landing = landing_positions(reduced_by(steps, prefix, alive), prefix, alive)
        source = landing if source is None else compose(source, landing)
        alive = len(steps[0].kept) + steps[0].fused
    for image in range(2):
        assert source[image].tolist() == follow(num_patches, [steps[image] for steps in layers])


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2_reg4", "deit_distilled"])
@pytest.mark.parametrize("method", METHODS)
def test_trace_follows_the_tokens_of_the_model(name, method):
    """Zeroed attention and MLP outputs leave every token as it was embedded: it can be recognised at the end."""
    model = make_host(name, torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
    images = images_for(model, batch=3)
    model.norm = torch.nn.Identity()
    embedded = model.forward_features(images)
    dense = trace(apply(model, method, keep=1.0), images)
    assert dense.sources == {}
    apply(model, method, layers=[1, 3], keep=[10, 6])
    traced = trace(model, images)
    assert list(traced.sources) == [1, 3]
    assert torch.equal(traced.output, model(images))
    assert not traced.output.requires_grad
    final, source, prefix = model.forward_features(images), traced.sources[3], model.num_prefix_tokens
    assert source.shape == (3, 16)
    assert source.dtype == torch.int64
    assert torch.equal(final[:, :prefix], embedded[:, :prefix])
    for image in range(3):
        for position in range(6):
            standing_for = (source[image] == position).nonzero().flatten()
            assert len(standing_for) > 0
            if method != "pomt" or position < 4:  # a fused token of the first layer may be the fifth
                assert torch.equal(final[image, prefix + position], embedded[image, prefix + standing_for[0]])
        assert (source[image] == -1).sum() == (0 if method == "pomt" else 10)
        kept = source[image][(source[image] >= 0) & (source[image] < 4)]
        assert kept.tolist() == sorted(kept.tolist())  # the original order


def test_fused_token_is_the_mean_of_its_patches():
    model = make_host("vit", torch.float64)
    apply(model, "pomt", layers=[2], keep=[9])
    images = images_for(model)
    inputs = []
    handle = model.blocks[2].norm2.register_forward_hook(lambda *args: inputs.append(args[1][0]))
    source = trace(model, images).sources[2]
    handle.remove()
    before = []
    apply(model, "random", keep=1.0)
    handle = model.blocks[2].norm2.register_forward_hook(lambda *args: before.append(args[1][0]))
    model(images)
    for image in range(2):
        fused = before[0][image, 1:][source[image] == 8]
        assert len(fused) == 8
        torch.testing.assert_close(inputs[0][image, -1], fused.mean(0))


def test_nothing_is_recorded_outside_a_trace():
    model = apply(make_host("vit"), "topk", keep=0.5)
    images = images_for(model)
    with recording() as outer:
        inner = trace(model, images)
        assert outer == {}
    model(images)
    assert outer == {}
    assert list(inner.sources) == [1, 2, 3]


@pytest.mark.parametrize("method", ["zero_tprune", "tome"])
def test_trace_with_gradient_checkpointing_and_in_place_compile(method):
    model = apply(make_host("vit", depth=3), method, layers=[0, 1], keep=[12, 7])
    images = images_for(model)
    plain = trace(model, images)
    model.set_grad_checkpointing()
    checkpointed = trace(model, images)
    model.set_grad_checkpointing(False)
    model.compile(backend="eager")
    model(images)
    for other in (checkpointed, trace(model, images)):
        assert torch.equal(other.output, plain.output)
        assert other.sources.keys() == plain.sources.keys()
        assert all(torch.equal(other.sources[layer], plain.sources[layer]) for layer in plain.sources)
