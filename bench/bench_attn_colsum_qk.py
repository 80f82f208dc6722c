"""Attention received from queries and keys: the kernel against its plain-torch reference, which forms the matrix.

Fused attention on the same q, k, v is timed beside it: the score costs about as much as attention itself. Shapes are
DeiT-T/S/B at 224, ViT-L at 224 and DeiT-B at 384.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main

from tokenprune_ext import ops
from tokenprune_ext.ops.attn_colsum_qk import reference

SHAPES = ((1, 3, 197), (1, 6, 197), (8, 6, 197), (8, 12, 197), (1, 16, 257), (1, 12, 577), (8, 12, 577))


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in SHAPES:
        for reduce in ("max", "mean"):
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v = (torch.randn(batch, heads, tokens, 64, device=device).to(dtype) for _ in range(3))
                args = (q, k, 0.125, reduce, "patch", 1)
                yield Case(
                    op="attn_colsum_qk",
                    shape={"B": batch, "H": heads, "N": tokens, "D": 64, "head_reduce": reduce},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.attn_colsum_qk(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    baselines={"fused attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)},
                    bytes_moved=2 * q.numel() * q.element_size() + batch * tokens * 4,
                    device=device,
                )


if __name__ == "__main__":
    main("attn_colsum_qk", __doc__, cases)
