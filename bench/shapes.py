"""The shapes that all benchmarks measure: attention of common vision transformers, 64 channels a head."""

from __future__ import annotations

import torch

HEAD_DIM = 64

# Heads and tokens. DeiT-T, -S, -B and ViT-L at 224; DINOv2-G at 224 and 518; DeiT-B at 384; its width with 4096 tokens.
MODELS = ((3, 197), (6, 197), (12, 197), (16, 257), (24, 257), (24, 1370), (12, 577), (12, 4096))
BATCHES = (1, 8, 64, 256)

# What keeps one benchmark below about three minutes.
ON_CPU = ((1, 3, 197), (1, 6, 197), (8, 6, 197), (8, 12, 197), (1, 16, 257), (1, 12, 577), (8, 12, 577), (1, 2, 4096))

COPIES = 8  # in float32: what a reference and the making of its inputs may hold of the attention matrix at a time


def attention_shapes(device: str) -> list[tuple[int, int, int]]:
    """Batch, heads and tokens, the smallest matrices first: those whose references fit the GPU; for meta, all."""
    if device == "cpu":
        return list(ON_CPU)
    found = sorted(((batch, heads, tokens) for heads, tokens in MODELS for batch in BATCHES), key=_matrix)
    if device == "meta":
        return found
    memory = torch.cuda.get_device_properties(device).total_memory
    return [shape for shape in found if _matrix(shape) * 4 * COPIES <= memory]


def token_shapes(device: str) -> list[tuple[int, int, int]]:
    """Batch, tokens and channels of the same models' tokens."""
    return [(batch, tokens, heads * HEAD_DIM) for batch, heads, tokens in attention_shapes(device)]


def metric_shapes(device: str) -> list[tuple[int, int, int]]:
    """Batch, tokens and channels of what is matched: keys, averaged over the heads, or tokens."""
    keys = [(batch, tokens, HEAD_DIM) for batch, _, tokens in attention_shapes(device)]
    return list(dict.fromkeys(keys + token_shapes(device)))


def _matrix(shape: tuple[int, int, int]) -> int:
    batch, heads, tokens = shape
    return batch * heads * tokens**2
