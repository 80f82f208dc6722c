"""Patching, taking it back, and everything one does with a model in between."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from host_models import HOSTS, PRUNING, images_for, make_host, skip_unsuited, snapshot
from timm.models.vision_transformer import Block
from torch import nn

from tokenprune_ext.patch import PrunedBlock, TokenState, inspect_host
from tokenprune_ext.prune import apply, remove, schedule_of, trace


def tokens_after_blocks(model, images):
    """Token count behind every block."""
    counts = []

    def count(*args):
        output = args[2]
        counts.append((output.x if isinstance(output, TokenState) else output).shape[1])

    hooks = [block.register_forward_hook(count) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", PRUNING)
def test_tokens_leave_where_the_schedule_says(name, method):
    model = make_host(name)
    skip_unsuited(method, model)
    images = images_for(model)
    dense = model(images)
    prefix = model.num_prefix_tokens
    assert apply(model, method, layers=[1, 2], keep=[12, 6]) is model
    assert schedule_of(model).keep == {1: 12, 2: 6}
    last = inspect_host(model).head_tokens if schedule_of(model).build_method().class_token_only else prefix + 6
    assert tokens_after_blocks(model, images) == [prefix + 16, prefix + 12, prefix + 6, last]
    pruned = model(images)
    assert pruned.shape == dense.shape
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, dense)


@pytest.mark.parametrize("name", HOSTS)
def test_remove_restores_everything(name):
    model = make_host(name)
    images = images_for(model)
    before, dense = snapshot(model), model(images)
    apply(model, "topk", keep=0.5)
    apply(model, "pomt", layers=[1], keep=[7])
    assert snapshot(model) != before
    assert remove(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(images), dense)
    assert snapshot(remove(model)) == before


def test_remove_of_any_module_is_a_no_op():
    module = torch.nn.Linear(2, 2)
    assert remove(module) is module


def test_apply_again_replaces():
    model, fresh = make_host("vit"), make_host("vit")
    images = images_for(model)
    apply(model, "zero_tprune", keep=0.5)
    apply(model, "topk", layers=[2], keep=[6])
    apply(fresh, "topk", layers=[2], keep=[6])
    assert [isinstance(block, PrunedBlock) for block in model.blocks] == [False, False, True, False]
    assert all(isinstance(block, Block) for block in model.blocks)
    assert schedule_of(model) == schedule_of(fresh)
    assert torch.equal(model(images), fresh(images))


def test_a_schedule_can_be_applied_to_another_model():
    model, other = make_host("vit"), make_host("deit")
    apply(other, schedule_of(apply(model, "zero_tprune", keep=0.6)))
    assert schedule_of(other).keep == schedule_of(model).keep


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("method", PRUNING)
def test_copies_prune_alike_and_on_their_own(method, how):
    model = apply(make_host("dinov2_reg4"), method, keep=0.75)
    images = images_for(model)
    pruned = model(images)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    remove(model)
    assert torch.equal(twin(images), pruned)
    assert schedule_of(twin).method == ("peaks" if method == "auto" else method)
    assert torch.equal(remove(twin)(images), model(images))


def test_state_dict_is_the_dense_one():
    dense, model = make_host("deit3"), make_host("deit3")
    apply(model, "pomt", keep=0.5)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(dense.state_dict(), strict=True)
    images = images_for(model)
    assert torch.equal(model(images), apply(dense, "pomt", keep=0.5)(images))


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter(method, checkpointing):
    model = apply(make_host("dropout"), method, layers=[1, 2], keep=0.5).train()
    images = images_for(model, batch=8)  # so that no branch is dropped for every image
    torch.manual_seed(0)
    model(images).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
    if checkpointing:
        model.zero_grad()
        model.set_grad_checkpointing()
        torch.manual_seed(0)
        model(images).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("method", PRUNING)
def test_half_precision_and_empty_batch(method):
    model = apply(make_host("dinov2"), method, keep=0.5).to(torch.bfloat16)
    output = model(images_for(model))
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert model(images_for(model)[:0]).shape == (0, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(images_for(model)).isfinite().all()


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2_reg4", "deit_distilled"])
@pytest.mark.parametrize("method", PRUNING)
def test_an_image_is_pruned_alike_in_any_batch(name, method):
    model = make_host(name, torch.float64)
    skip_unsuited(method, model)
    apply(model, method, layers=[0, 1, 2], keep=0.7)
    images = images_for(model, batch=3)
    together = trace(model, images)
    assert method == "random" or not torch.equal(together.sources[2][0], together.sources[2][1])
    for index in range(3):
        alone = trace(model, images[index : index + 1])
        torch.testing.assert_close(alone.output[0], together.output[index])
        for layer, source in alone.sources.items():
            assert torch.equal(source[0], together.sources[layer][index])


def test_hooks_on_blocks_still_run():
    model = make_host("vit")
    seen = []
    model.blocks[1].register_forward_hook(lambda *args: seen.append(args[2].shape))
    apply(model, "topk", layers=[1], keep=[4])(images_for(model))
    assert seen == [(2, 5, 32)]


@pytest.mark.parametrize("part", ["attn.q_norm", "attn.proj_drop", "drop_path1", "ls2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_parts_that_do_nothing_still_run(part, kind):
    """What such a part is given comes back, and so it is not called, unless somebody listens."""
    model = apply(make_host("vit"), "topk", layers=[1], keep=[4])
    images = images_for(model)
    block = model.blocks[1]
    module = block.get_submodule(part)
    assert type(module) in (nn.Identity, nn.Dropout)
    seen = []
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(args[0]))
    model(images).sum().backward()
    assert seen == [module]
    handle.remove()
    model(images).sum().backward()
    assert seen == [module]


def test_a_hook_changes_what_a_part_hands_on():
    model = apply(make_host("vit"), "topk", layers=[1], keep=[4])
    images = images_for(model)
    before = model(images)
    with model.blocks[1].ls1.register_forward_hook(lambda module, args, out: 2 * out):
        assert not torch.equal(model(images), before)
    assert torch.equal(model(images), before)


def test_dropout_drops_in_training():
    model = apply(make_host("vit", proj_drop_rate=0.5), "topk", layers=[1], keep=[4])
    block, tokens = model.blocks[1], torch.randn(2, 17, 32)
    assert torch.equal(block(tokens), block(tokens))
    block.attn.train()  # its own dropout alone: the MLP has some too
    assert not torch.equal(block(tokens), block(tokens))
