"""A pruned model never holds an N x N matrix: neither its attention nor the scores need one."""

from __future__ import annotations

import pytest
import torch
from host_models import PRUNING
from timm.models.vision_transformer import VisionTransformer
from torch.profiler import ProfilerActivity, profile

import tokenprune_ext as tokenprune

HEADS = 4
TOKENS = 1 + 32 * 32
MATRIX_BYTES = HEADS * TOKENS**2 * 4  # 17 MB; the largest tensor of the model has 1 MB


def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=128, patch_size=4, embed_dim=64, depth=4, num_heads=HEADS, num_classes=10).eval()


def largest_allocation(vit: VisionTransformer) -> int:
    """Bytes of the largest tensor that a forward of one image allocates."""
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        vit(image)
    return max(event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("name", PRUNING)
def test_no_matrix_is_allocated(name: str) -> None:
    vit = tokenprune.apply(model(), name, keep=0.5)
    assert largest_allocation(vit) < MATRIX_BYTES / HEADS


def test_a_matrix_would_be_seen() -> None:
    vit = model()
    for block in vit.blocks:
        block.attn.fused_attn = False
    assert largest_allocation(vit) >= MATRIX_BYTES
