"""What the operators that score from queries and keys share: checks, the matrix of their references, gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import accumulate_dtype, check_floating


def check_qk(q: object, k: object, scale: float) -> None:
    """``q`` and ``k`` are ``[B, H, N, d]`` of one dtype and device with at least one head, token and channel."""
    check_floating("q", q, "[B, H, N, d]")
    check_floating("k", k, "[B, H, N, d]")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    if q.shape != k.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}, got {list(k.shape)}")
    if q.dtype != k.dtype:
        raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"k must be on the device of q, {q.device}, got {k.device}")
    if min(q.shape[1:]) < 1:
        raise ValueError(f"q must have at least one head, one token and one channel, got shape {list(q.shape)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``q k^T * scale`` in the dtype of sums, ``[B, H, N, N]``."""
    dtype = accumulate_dtype(q.dtype)
    return torch.matmul(q.to(dtype) * scale, k.to(dtype).transpose(-2, -1))


def probabilities(q: Tensor, k: Tensor, scale: float, lse: Tensor | None = None) -> Tensor:
    """Attention ``[B, H, N, N]`` in the dtype of sums; ``lse`` saves the sums over keys."""
    values = logits(q, k, scale)
    return values.softmax(-1) if lse is None else (values - lse.unsqueeze(-1)).exp()


def qk_gradients(attn: Tensor, grad: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """From the gradient of the probabilities to those of ``q`` and ``k``, all ``[B, H, N, ...]``."""
    grad = attn * (grad - (grad * attn).sum(-1, keepdim=True)) * scale
    grad_q = torch.matmul(grad, k.to(grad.dtype))
    grad_k = torch.matmul(grad.transpose(-2, -1), q.to(grad.dtype))
    return grad_q.to(q.dtype), grad_k.to(k.dtype)
