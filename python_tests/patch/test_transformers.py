"""What only models of Hugging Face transformers can do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from host_models import checkpointed, images_for, logits, make_host, set_fused, snapshot, tokens_behind_blocks

from tokenprune_ext.patch import UnsupportedModelError, adapter_of, inspect_host
from tokenprune_ext.prune import apply, describe, remove

transformers = pytest.importorskip("transformers", minversion="5.19")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SMALL_IMAGES = {**SMALL, "image_size": 32, "patch_size": 16}
NAMES = ("hf_vit", "hf_dinov2_bare", "hf_dinov3_bare", "hf_clip", "hf_siglip_bare")


def test_it_is_not_imported_for_others(tmp_path):
    code = "import sys, timm, tokenprune_ext, tokenprune_ext.prune as p\n"
    code += "p.apply(timm.create_model('vit_tiny_patch16_224', depth=2), 'topk', keep=0.5)\n"
    code += "assert not any(name.split('.')[0] == 'transformers' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # not beside the sources


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_tensors_of_the_tokens_that_are_left(name):
    model = make_host(name)
    images = images_for(model)
    dense = model(images, output_hidden_states=True).hidden_states
    prefix = inspect_host(model).num_prefix_tokens
    apply(model, "tome", layers=[0, 1], keep=[12, 7])  # in spite of the hooks transformers left behind
    pruned = model(images, output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in pruned] == [prefix + 16, prefix + 12, prefix + 7, prefix + 7]
    assert torch.equal(pruned[0], dense[0])
    assert all(map(torch.equal, model(images, output_hidden_states=True, return_dict=False)[-1], pruned))
    remove(model)
    assert all(map(torch.equal, model(images, output_hidden_states=True).hidden_states, dense))


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights_are_refused(name):
    model = make_host(name)
    set_fused(model, False)
    images = images_for(model)
    assert len(model(images, output_attentions=True).attentions) == 3
    apply(model, "topk", layers=[1], keep=0.5)
    with pytest.raises(ValueError, match="output_attentions does not work on a pruned model"):
        model(images, output_attentions=True)
    expected = logits(model, images)
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    for config in configs:
        config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions does not work on a pruned model"):
        model(images)
    for config in configs:
        config.output_attentions = False
    assert torch.equal(logits(model, images), expected)


def test_masks_are_refused():
    model = apply(make_host("hf_vit"), "topk", layers=[1], keep=0.5)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 5] = False
    with pytest.raises(ValueError, match="attention_mask does not work on a pruned model"):
        model(images_for(model), attention_mask=mask)
    with pytest.raises(ValueError, match="is_causal does not work on a pruned model"):
        model(images_for(model), is_causal=True)


def test_training_with_labels():
    model = apply(make_host("hf_vit"), "peaks", keep=0.7).train()
    output = model(pixel_values=images_for(model), labels=torch.tensor([1, 2]), num_items_in_batch=torch.tensor(2))
    output.loss.backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())


def test_checkpointing_reaches_the_pruned_blocks():
    model = apply(make_host("hf_vit"), "topk", layers=[1], keep=0.5).train()
    checkpointed(model, use_reentrant=False)
    seen = []
    for block in adapter_of(model).blocks(model):
        inner = block._gradient_checkpointing_func
        block._gradient_checkpointing_func = lambda *args, inner=inner: seen.append(len(args)) or inner(*args)
    logits(model, images_for(model)).sum().backward()
    assert len(seen) == 3


def test_reentrant_checkpointing():
    model = apply(make_host("hf_vit"), "topk", layers=[0, 1], keep=0.5).train()  # hands on plain tensors
    checkpointed(model, use_reentrant=True)
    logits(model, images_for(model).requires_grad_()).sum().backward()
    apply(model, "tome", layers=[0, 1], keep=0.7)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        logits(model, images_for(model).requires_grad_())


def test_attention_can_be_changed_while_patched():
    model = apply(make_host("hf_dinov2"), "peaks", keep=0.7)
    images = images_for(model)
    expected = logits(model, images)
    set_fused(model, False)
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_model_is_saved_as_the_dense_one(tmp_path):
    model = make_host("hf_vit")
    images = images_for(model)
    dense = logits(model, images)
    apply(model, "topk", keep=0.5).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, images), dense)
    assert inspect_host(loaded).model == str(tmp_path)
    assert describe(apply(loaded, "topk", keep=0.5)).blocks_macs < describe(loaded).dense_blocks_macs


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_image_tower_of_a_dual_model(name):
    vision = {**SMALL_IMAGES, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(text_config=SMALL, vision_config=vision)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with pytest.raises(UnsupportedModelError, match=rf"{name}Model is not supported, but its vision_model is: patch"):
        apply(model, "topk", layers=[0], keep=0.5)
    images = torch.randn(2, 3, 32, 32)
    before = snapshot(model)
    dense = model.get_image_features(images).pooler_output
    apply(model.vision_model, "topk", layers=[0], keep=0.5)
    pruned = model.get_image_features(images).pooler_output
    assert pruned.shape == dense.shape
    assert not torch.equal(pruned, dense)
    remove(model.vision_model)
    assert torch.equal(model.get_image_features(images).pooler_output, dense)
    assert snapshot(model) == before


def hooked(model):
    model.vit.layers[1].attention.register_forward_hook(lambda *args: None)


def flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"


def another_part(model):
    model.vit.layers[1].attention.adapter = torch.nn.Linear(2, 2)


def another_block(model):
    model.vit.layers[1] = torch.nn.Identity()


def replaced(model):
    model.vit.layers[1].forward = lambda x: x


REFUSED = {
    "hooks": (hooked, "block 1 is not supported: its attention has forward hooks"),
    "flash attention": (flash, r"flash_attention_2 is not supported: call model.set_attn_implementation\(.sdpa.\)"),
    "unknown part": (another_part, r"the attention of block 1 is not supported: unknown parts \['adapter'\]"),
    "unknown block": (another_block, "block 1 is not supported: torch.nn.modules.linear.Identity"),
    "forward replaced": (replaced, "block 1 is not supported: its forward was replaced"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    change, message = REFUSED[case]
    model = make_host("hf_vit")
    change(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        apply(model, "topk", layers=[1], keep=0.5)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        ("BeitModel", "BeitConfig", SMALL_IMAGES),
        ("ViTForMaskedImageModeling", "ViTConfig", SMALL_IMAGES),
        ("Dinov2Backbone", "Dinov2Config", SMALL_IMAGES),
        ("Siglip2VisionModel", "Siglip2VisionConfig", {**SMALL, "num_patches": 16}),
        ("SwinModel", "SwinConfig", {"embed_dim": 8, "depths": [1], "num_heads": [1], "image_size": 32}),
    ],
)
def test_other_models_are_refused(model, config, options):
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    with pytest.raises(UnsupportedModelError, match=rf"\.{model} is not supported.*Supported: .*transformers ViT"):
        apply(made, "topk", layers=[0], keep=0.5)


def test_a_subclass_is_refused():
    class OwnViT(transformers.ViTModel):
        """Could do anything in its forward."""

    with pytest.raises(UnsupportedModelError, match="OwnViT is not supported"):
        apply(OwnViT(transformers.ViTConfig(**SMALL_IMAGES)), "topk", layers=[0], keep=0.5)


@pytest.mark.parametrize("eager", [False, True])
def test_compile_without_graph_breaks(eager):
    model = make_host("hf_vit")
    set_fused(model, not eager)
    apply(model, "peaks", layers=[1], keep=0.7)
    images = images_for(model)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(logits(compiled, images), logits(model, images))
    torch.compiler.reset()


def test_a_tower_with_a_list_of_unknown_blocks():
    model = make_host("hf_siglip_bare")
    model.encoder.layers = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(UnsupportedModelError, match="none of its modules is a list of blocks that are known"):
        apply(model, "topk", layers=[0], keep=0.5)
    assert tokens_behind_blocks(make_host("hf_siglip_bare"), torch.randn(1, 3, 64, 64)) == [16] * 3
