"""Masking tokens in training is removing them, and decisions can be learned through it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dynamicvit.models import BEFORE, KEEP, LAYERS, make, noise_of
from dynamicvit.slow import attention
from host_models import images_for
from torch import Tensor, nn

from tokenprune_ext.dynamicvit import Masked, MaskedViT, gumbel_decision, masked_attention, predictors_of, teach
from tokenprune_ext.patch import Projected
from tokenprune_ext.prune import apply, remove, trace


def random_masks(batch: int) -> Tensor:
    """Of 16 tokens, KEEP are still there behind each stage; others in every image."""
    rank = torch.rand(batch, 16, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1)
    return torch.stack([(rank < keep).double() for keep in KEEP], 1)


def removed_forward(model: nn.Module, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the patch tokens that are left, of one image whose other tokens are really removed."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    prefix = model.num_prefix_tokens
    left = torch.arange(16)
    for index, block in enumerate(model.blocks):
        if index in BEFORE:
            stays = masks[BEFORE.index(index)][left] > 0
            x, left = torch.cat([x[:, :prefix], x[:, prefix:][:, stays]], 1), left[stays]
        x = block(x)
    x = model.norm(x)
    return model.forward_head(x)[0], x[0, prefix:]


@pytest.mark.parametrize("host", ["deit", "dinov2_reg4", "qk_norm", "augreg"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_masking_is_removing(host, mode):
    model = make(host)
    masked = getattr(MaskedViT(model), mode)()
    images, masks = images_for(model, batch=3), random_masks(3)
    with torch.no_grad():
        output = masked(images, masks)
        assert torch.equal(output.masks, masks.float())
        for image in range(3):
            logits, tokens = removed_forward(model, images[image], masks[image])
            torch.testing.assert_close(output.logits[image], logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.tokens[image, masks[image, -1] > 0], tokens, rtol=1e-5, atol=1e-5)


def test_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    there = torch.rand(2, 6) < 0.5
    found = masked_attention(Projected(q, k, v, 0.7), there.double())
    for image in range(2):
        for head in range(2):
            part = (tensor[image, head] for tensor in (q, k, v))
            slow = attention(*part, 0.7, there[image].tolist())
            torch.testing.assert_close(found[image, head], torch.tensor(slow, dtype=torch.float64))


def test_attention_survives_logits_that_overflow_exp():
    q = torch.full((1, 1, 3, 4), 30.0)
    found = masked_attention(Projected(q, q * torch.tensor([1, 1, -1])[:, None], q, 1.0), torch.tensor([[0.0, 0, 1]]))
    assert found.isfinite().all()


@pytest.mark.parametrize("host", ["deit", "dinov2_reg4"])
def test_static_inference_is_the_masked_model_with_the_same_tokens(host):
    model = make(host)
    images = images_for(model, batch=4)
    traced = trace(apply(model, "dynamicvit", layers=LAYERS, keep=KEEP), images)
    assert {layer: kept.sum(1).tolist() for layer, kept in traced.kept.items()} == {
        layer: [keep] * 4 for layer, keep in zip(LAYERS, KEEP, strict=True)
    }
    with torch.no_grad():
        output = MaskedViT(remove(model)).eval()(images, torch.stack(list(traced.kept.values()), 1))
    torch.testing.assert_close(traced.output, output.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_predictors_choose_by_what_the_masked_model_shows_them(mode):
    """The same decisions, taken one stage after the other with the tokens really removed."""
    model = make(dtype=torch.float64)
    masked = getattr(MaskedViT(model), mode)()
    images = images_for(model, batch=1)
    with torch.no_grad():
        output = masked(images, noise=noise_of(3))
        x, left, noise = model._pos_embed(model.patch_embed(images)), torch.arange(16), torch.Generator().manual_seed(3)
        for index, block in enumerate(model.blocks):
            if index in BEFORE:
                stage = BEFORE.index(index)
                scores = predictors_of(model)[stage](x[:, 1:])[0]
                if mode == "train":
                    drawn = torch.empty(1, 16, 2, dtype=torch.float64).exponential_(generator=noise)[0, left]
                    scores = scores - drawn.log()
                stays = scores[:, 0] >= scores[:, 1]
                x, left = torch.cat([x[:, :1], x[:, 1:][:, stays]], 1), left[stays]
                assert output.masks[0, stage].nonzero().flatten().tolist() == left.tolist()
            x = block(x)
    assert 0 < len(left) < 16


def test_gumbel_decisions_are_exact_and_follow_their_probabilities():
    torch.manual_seed(0)
    log_probabilities = torch.tensor([0.9, 0.1]).log().expand(1, 20000, 2).clone().requires_grad_()
    decisions = gumbel_decision(log_probabilities)
    assert set(decisions.unique().tolist()) == {0.0, 1.0}
    assert abs(decisions.mean().item() - 0.9) < 0.01
    (gradient,) = torch.autograd.grad(decisions.sum(), log_probabilities)
    assert (gradient[..., 0] > 0).all()
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1])


def test_noise_comes_from_the_generator():
    model = MaskedViT(make()).train()
    images = images_for(model.model, batch=4)

    def masks(seed: int) -> Tensor:
        return model(images, noise=noise_of(seed)).masks

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))
    model.eval()
    assert torch.equal(masks(0), masks(1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_predictor_through_the_logits_alone(checkpointing):
    model = make()
    model.set_grad_checkpointing(checkpointing)
    student = MaskedViT(model).train()
    images = images_for(model)
    student(images, noise=noise_of(0)).logits.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_dropped_token_learns_what_it_would_have_been_worth():
    """The gradient of a mask entry is that of the soft weight, also where it is 0 and fused attention has none."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 1, 0, 1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda mask: masked_attention(Projected(q, k, v, 0.5), mask), (mask,))
    (gradient,) = torch.autograd.grad(masked_attention(Projected(q, k, v, 0.5), mask).square().sum(), mask)
    assert gradient[0, 1] != 0


def test_teacher_is_the_dense_model():
    model = make()
    images = images_for(model)
    taught = teach(model, images)
    torch.testing.assert_close(taught.logits, model(images))
    everything = MaskedViT(model)(images, torch.ones(2, 3, 16))
    torch.testing.assert_close(taught.tokens, everything.tokens)
    assert not taught.tokens.requires_grad


def test_what_cannot_be_trained_is_refused():
    model = make()
    with pytest.raises(ValueError, match="the model is pruned"):
        MaskedViT(apply(model, "topk", keep=0.5))
    del model.score_predictor
    with pytest.raises(ValueError, match="no trained predictors"):
        MaskedViT(remove(model))


def test_autocast_trains():
    student = MaskedViT(make()).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = student(images_for(student.model))
    output.logits.float().sum().backward()
    assert output.masks.dtype == torch.float32
    assert set(output.masks.unique().tolist()) <= {0.0, 1.0}


def test_compiled_training():
    """One graph, and the gradients of the model as it is; the noise of a compiled forward is drawn otherwise."""
    student, masks = MaskedViT(make()).train(), random_masks(2)
    images = images_for(student.model)

    def gradients(run: Callable[..., Masked]) -> list[Tensor | None]:
        student.zero_grad()
        run(images, masks).logits.square().sum().backward()
        return [parameter.grad for parameter in student.model.blocks.parameters()]

    torch.compiler.reset()
    found = gradients(torch.compile(student, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, gradients(student), rtol=1e-4, atol=1e-4)
    torch.compile(student, fullgraph=True, backend="aot_eager")(images).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in predictors_of(student.model).parameters())
    torch.compiler.reset()
