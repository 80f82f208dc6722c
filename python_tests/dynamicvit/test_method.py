"""The registered method: patching, copies, costs and what else pruned models can do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from dynamicvit.models import KEEP, LAYERS, make
from host_models import images_for, make_host, snapshot
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenprune_ext as tokenprune
from tokenprune_ext import methods
from tokenprune_ext.dynamicvit import predictors_of
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.patch.timm_features import embed


def pruned(host: str = "deit", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return tokenprune.apply(make(host, dtype), methods.create("dynamicvit", **options), layers=LAYERS, keep=KEEP)


def test_it_is_known_by_name_and_not_offered_for_untrained_models():
    assert "dynamicvit" not in methods.available()
    assert set(methods.available(trained=True)) == {*methods.available(), "dynamicvit"}
    assert methods.create("dynamicvit").default_layers(12) == (2, 5, 8)
    with pytest.raises(ValueError, match=r"available: .*dynamicvit"):
        methods.create("nonsense")
    with pytest.raises(ValueError, match="reduction must be one of drop, mean, merge"):
        methods.create("dynamicvit", reduction="sum")


def test_the_most_probable_tokens_stay():
    """Stage by stage with torch alone: sort the predictor's first output, keep the best, in their order."""
    model = make(dtype=torch.float64)
    images = images_for(model, batch=3)
    x, _ = embed(model, images)
    for index, block in enumerate(model.blocks):
        if index - 1 in LAYERS:
            patches = x[:, 1:]
            scores = predictors_of(model)[index - 1](patches)[..., 0]
            best = scores.argsort(1, descending=True)[:, : KEEP[index - 1]].sort(1).values
            x = torch.cat([x[:, :1], patches.gather(1, best[..., None].expand(-1, -1, x.shape[2]))], 1)
        x = block(x)
    expected = model.forward_head(model.norm(x))
    traced = tokenprune.trace(tokenprune.apply(model, "dynamicvit", layers=LAYERS, keep=KEEP), images)
    torch.testing.assert_close(traced.output, expected)
    assert [traced.counts[layer].tolist() for layer in LAYERS] == [[keep] * 3 for keep in KEEP]
    assert list(traced.scores) == list(LAYERS)
    assert (traced.scores[0] <= 0).all()


def test_apply_and_remove_change_nothing_else():
    model = make()
    images = images_for(model)
    before, dense = snapshot(model), model(images)
    tokenprune.apply(model, "dynamicvit", layers=LAYERS, keep=0.7)
    assert list(tokenprune.schedule_of(model).keep.values()) == [11, 7, 4]
    assert not torch.equal(model(images), dense)
    assert snapshot(tokenprune.remove(model)) == before
    assert torch.equal(model(images), dense)
    with pytest.warns(UserWarning, match="prunes nothing"):
        tokenprune.apply(model, "dynamicvit", layers=LAYERS, keep=1.0)
    assert torch.equal(model(images), dense)


def test_an_image_does_not_depend_on_its_batch():
    model = pruned(dtype=torch.float64)
    images = images_for(model, batch=4)
    alone = [tokenprune.trace(model, image[None]) for image in images]
    together = tokenprune.trace(model, images)
    for layer in LAYERS:
        assert torch.equal(torch.cat([one.kept[layer] for one in alone]), together.kept[layer])


@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"reduction": "merge"}, {"class_token_only": True}])
def test_options(options):
    model = pruned(**options)
    assert model(images_for(model)).isfinite().all()
    if options.get("reduction"):
        assert tokenprune.trace(model, images_for(model)).sources[2].min() == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_predictors_of_its_own(how):
    model = pruned()
    images = images_for(model)
    expected = model(images)
    twin = how(model)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        for predictor in predictors_of(twin):
            predictor.out_conv[4].weight.neg_()
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)


def test_weights_that_are_loaded_later_count():
    model, other = pruned(), pruned()
    images = images_for(model)
    with torch.no_grad():
        for predictor in predictors_of(other):
            predictor.out_conv[4].weight.neg_()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), other(images))
    model.to(torch.bfloat16)
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_training_the_pruned_model_leaves_the_predictors_alone():
    model = pruned().train()
    model(images_for(model)).square().sum().backward()
    assert all(parameter.grad is None for parameter in predictors_of(model).parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_predictors_are_charged():
    model = pruned()
    twin = copy.deepcopy(model).to("meta").requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, *inspect_host(model).input_size, device="meta"))
    description = tokenprune.describe(model)
    width = 32
    one = width**2 + width * width // 2 + width // 2 * width // 4 + width // 4 * 2
    assert [layer.scoring_macs for layer in description.layers] == [16 * one, 12 * one, 9 * one, 0]
    assert description.model_macs + description.scoring_macs == counter.get_total_flops() // 2
    tokenprune.apply(model, "dynamicvit", layers=LAYERS, macs=0.9)
    described = tokenprune.describe(model)
    assert described.blocks_macs + described.scoring_macs <= 0.9 * described.dense_blocks_macs


def test_a_schedule_alone_prunes():
    model, other = pruned(), make()
    schedule = tokenprune.Schedule.from_json(tokenprune.schedule_of(model).to_json())
    images = images_for(model)
    assert torch.equal(tokenprune.apply(other, schedule)(images), model(images))


def test_a_model_without_the_predictors_is_refused():
    model = make_host("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"VisionTransformer has no trained predictors.*load_model"):
        tokenprune.apply(model, "dynamicvit", layers=[1], keep=0.7)
    assert snapshot(model) == before
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no predictor to prune with at layer 3; the model has layers=\[0, 1, 2\]"):
        tokenprune.apply(model, "dynamicvit", layers=[1, 3], keep=0.7)
    assert snapshot(model) == before


def test_compiled_and_exported(tmp_path):
    from tokenprune_ext.export import export_program, load_program

    model = pruned()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.compiler.reset()
        exported = load_program(export_program(model, tmp_path / "model.pt2"))(images)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from tokenprune_ext.export import export_onnx

    model = pruned()
    export_onnx(model, tmp_path / "model.onnx")
    images = images_for(model, batch=3)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_full_grid_comes_back():
    model = pruned()
    final, grids = model.forward_intermediates(images_for(model), indices=[1, 3])
    assert final.shape == (2, 1 + KEEP[-1], 32)
    assert [grid.shape for grid in grids] == [(2, 32, 4, 4)] * 2
