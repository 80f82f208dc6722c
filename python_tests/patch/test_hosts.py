"""Every method on every host, and everything one does with a pruned model on one host of each kind."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from host_models import (
    ALL_HOSTS,
    BEIT,
    EVA,
    PRUNING,
    checkpointed,
    images_for,
    logits,
    make_host,
    shared_host,
    skip_unsuited,
    snapshot,
    tokens_behind_blocks,
)

from tokenprune_ext import methods
from tokenprune_ext.patch import Host, Reduced, TokenState, adapter_of, inspect_host
from tokenprune_ext.patch.block import _positions
from tokenprune_ext.prune import apply, describe, remove, trace

TABLE = Path(__file__).resolve().parents[2] / "docs" / "hosts.md"
ONE_OF_EACH = ("vit", "eva02_clip", "rope_mixed", "beit_token", "hf_vit", "hf_dinov3_bare", "hf_siglip")
POSITIONAL = (*(name for name in (*EVA, *BEIT) if name not in ("eva", "eva02_post_norm")), "hf_dinov3_bare")


@pytest.fixture
def host(request):
    """A host with its images, its dense result and what it consists of; left as it was."""
    model = shared_host(request.param)
    images = images_for(model)
    with torch.no_grad():
        dense = logits(model, images)
        before = snapshot(model)
        yield model, images, dense
        assert snapshot(remove(model)) == before
        assert torch.equal(logits(model, images), dense)


@pytest.mark.parametrize("host", ALL_HOSTS, indirect=True)
@pytest.mark.parametrize("method", PRUNING)
def test_method_on_host(host, method):
    model, images, dense = host
    skip_unsuited(method, model)
    apply(model, method, keep=0.7)
    pruned = logits(model, images)
    assert pruned.isfinite().all()
    assert pruned.dtype == dense.dtype
    assert pruned.shape == dense.shape or pruned.shape[1] < dense.shape[1]  # tokens, where the model returns those
    assert not torch.equal(pruned[:, :1], dense[:, :1])


@pytest.mark.parametrize("name", ALL_HOSTS)
def test_the_table_is_current(name):
    """docs/hosts.md has every model, and says what each method does with it."""
    if not TABLE.exists():
        pytest.skip("no source tree")
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("|")]
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    found = dict(zip(head, next(row for row in rows if row[0] == name), strict=True))
    host = inspect_host(shared_host(name))
    assert found["model"] == host.model
    for method in PRUNING:
        try:
            methods.create(method).for_host(host).check_host(host)
            assert found[f"`{method}`"] == "yes"
        except ValueError:
            assert found[f"`{method}`"].startswith("no (")


@pytest.mark.parametrize("host", ALL_HOSTS, indirect=True)
@pytest.mark.parametrize("method", ["topk", "tome", "evit"])
def test_tokens_leave_where_the_schedule_says(host, method):
    model, images, _ = host
    skip_unsuited(method, model)
    prefix = inspect_host(model).num_prefix_tokens
    apply(model, method, layers=[0, 1], keep=[12, 6])
    expected = [prefix + 12, prefix + 6] + [prefix + 6] * (inspect_host(model).depth - 2)
    assert tokens_behind_blocks(model, images) == expected
    report = describe(model)
    assert [layer.tokens_out for layer in report.layers] == expected
    assert 0 < report.model_macs - report.blocks_macs < report.dense_model_macs - report.dense_blocks_macs + 1
    assert report.blocks_macs < 0.8 * report.dense_blocks_macs


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("method", PRUNING)
def test_low_precision(name, method):
    model = make_host(name)
    skip_unsuited(method, model)
    images = images_for(apply(model, method, keep=0.7))
    with torch.no_grad():
        expected = logits(model, images)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                found = logits(model, images)
            assert found.isfinite().all()
        found = logits(model.to(torch.bfloat16), images.to(torch.bfloat16))
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("method", ["peaks", "evit", "topk"])
def test_training_and_checkpointing(name, method):
    model = make_host(name)
    skip_unsuited(method, model)
    apply(model, method, layers=[0, 1], keep=[12, 6]).train()
    images = images_for(model)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        logits(model, images).square().sum().backward()
        return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}

    plain = gradients()
    assert all(part.grad is not None for block in adapter_of(model).blocks(model) for part in block.parameters())
    assert all(gradient.isfinite().all() for gradient in plain.values())
    checkpointed(model)
    again = gradients()
    assert again.keys() == plain.keys()
    for part, gradient in again.items():
        torch.testing.assert_close(gradient, plain[part])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("method", ["auto", "evit"])
def test_copies_and_state_dict(name, method):
    dense, model = make_host(name), make_host(name)
    skip_unsuited(method, model)
    images = images_for(model)
    apply(model, method, keep=0.7)
    assert list(model.state_dict()) == list(dense.state_dict())
    with torch.no_grad():
        pruned = logits(model, images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin, images), pruned)
            assert torch.equal(logits(remove(twin), images), logits(dense, images))
        assert torch.equal(logits(model, images), pruned)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_image_is_pruned_alike_in_any_batch(name):
    model = apply(make_host(name, torch.float64), "peaks", keep=0.7)
    images = images_for(model, batch=3)
    together, alone = trace(model, images), trace(model, images[1:2])
    for layer, source in alone.sources.items():
        assert torch.equal(source[0], together.sources[layer][1])
    assert together.sources


@pytest.mark.parametrize("name", POSITIONAL)
def test_tokens_keep_their_places(name):
    """Some tokens at their places are projected as among all, and so is the bias between them."""
    model = make_host(name, torch.float64)
    host, adapter = inspect_host(model), adapter_of(model)
    assert host.positional
    block, prefix = adapter.blocks(model)[1], host.num_prefix_tokens
    seen = []
    handle = block.register_forward_pre_hook(lambda *args: seen.append(args[1:]), with_kwargs=True)
    logits(model, images_for(model))
    handle.remove()
    (x, *rest), keywords = seen[0]
    call = adapter.call_arguments(*rest, **keywords)
    assert call
    place = torch.tensor([[3, 0, 7, 7], [15, 1, 2, 9]])  # one may be there twice, as fused tokens are
    token = torch.cat([torch.arange(prefix).expand(2, -1), place + prefix], 1)
    every = adapter.project(block, x, x.shape[1], None, **call)
    some = adapter.project(block, x.take_along_dim(token[..., None], 1), token.shape[1], place, **call)
    for full, part in zip(every[:3], some[:3], strict=True):
        torch.testing.assert_close(part, full.take_along_dim(token[:, None, :, None], 2))
    if every.bias is None:
        assert some.bias is None
    else:
        rows = every.bias.expand(2, -1, -1, -1).take_along_dim(token[:, None, :, None], 2)
        torch.testing.assert_close(some.bias, rows.take_along_dim(token[:, None, None, :], 3))
    elsewhere = adapter.project(block, x.take_along_dim(token[..., None], 1), token.shape[1], 15 - place, **call)
    changed = elsewhere.q if every.bias is None else elsewhere.bias
    assert not torch.allclose(changed, some.q if every.bias is None else some.bias)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kept", [[0, 1, 2], [4, 5, 6], [1, 3, 6], [0, 6]])
def test_positions(kept, fused):
    """A fused token is where the middle one of those it stands for was."""
    host = Host("m", 1, (8, 8), 2, True, (2, 4), 8, positional=True)
    where = torch.tensor([[9, 2, 4, 7, 1, 0, 5], [0, 1, 2, 3, 4, 5, 6]])
    reduced = Reduced(torch.empty(0), torch.tensor([kept, kept]) + 2, fused)
    for position in (where, None):
        found = _positions(position, reduced, host, 7)
        for image, row in enumerate(where if position is not None else [torch.arange(7)] * 2):
            gone = [int(place) for index, place in enumerate(row) if index not in kept]
            expected = [*row[kept].tolist(), *([gone[(len(gone) - 1) // 2]] if fused else [])]
            assert found[image].tolist() == expected


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    model = apply(make_host("vit"), "tome", layers=[0], keep=[12])
    assert isinstance(model.blocks[0](torch.randn(1, 17, 32)), TokenState)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.blocks[1]((torch.randn(1, 13, 32), None, None, None))
    blocks = model.blocks
    x = torch.randn(1, 17, 32, requires_grad=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        blocks[1](torch.utils.checkpoint.checkpoint(blocks[0], x, use_reentrant=True))
