"""Argument checks shared by the operators. Each names the argument, the value and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32(value: object) -> bool:
    """Whether torch lets products of this float32 tensor round their factors to tf32; never on the CPU."""
    return not getattr(value, "is_cpu", True) and _products_in_tf32()


def _products_in_tf32() -> bool:
    # Set by allow_tf32 too. That cannot be read any more where this has been set, which is an error of torch.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result does, after a second of imports: torch.compile cannot trace the setting. It
# compiles again when the setting changes.
_products_in_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def widened(value: Any, of: object, integers: bool = False) -> Any:
    """``value`` in the dtype that sums over ``of`` are formed in. What is not floating is left to the checks, unless
    ``integers`` are as good; so is what is no tensor."""
    if not (isinstance(value, Tensor) and isinstance(of, Tensor)):
        return value
    if value.dtype == of.dtype and of.dtype in (torch.float32, torch.float64):
        return value
    dtype = accumulate_dtype(of.dtype)
    if value.dtype == dtype or not (integers or value.dtype in FLOAT_DTYPES):
        return value
    return value.to(dtype)


def check_floating(name: str, value: object, shape: str) -> None:
    """``value`` is a tensor of a supported dtype with as many dimensions as ``shape`` names, e.g. ``"[B, H, N]"`` or
    ``"[B, N] or [B, H, N]"``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.dim() not in [one.count(",") + 1 for one in shape.split(" or ")]:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")


def check_attention(attn: object) -> None:
    """``attn`` is a batch of square attention matrices ``[B, H, N, N]`` with at least one head and one token."""
    check_floating("attn", attn, "[B, H, N, N]")
    assert isinstance(attn, Tensor)
    heads, rows, columns = attn.shape[1:]
    if rows != columns:
        raise ValueError(f"attn must have shape [B, H, N, N] with equal last dimensions, got {list(attn.shape)}")
    if heads < 1 or rows < 1:
        raise ValueError(f"attn must have at least one head and one token, got shape {list(attn.shape)}")
