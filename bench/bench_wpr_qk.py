"""Weighted page rank from queries and keys: the kernel against its plain-torch reference, which forms the matrix.

tol is 0, so that every variant makes all its iterations. Fused attention on the same q, k, v is timed beside it. Shapes
are DeiT-T/S/B at 224, ViT-L at 224, DeiT-B at 384 and 1024 tokens, where the matrix is formed again in every iteration.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main

from tokenprune_ext import ops
from tokenprune_ext.ops.wpr_qk import reference

SHAPES = ((1, 3, 197), (1, 6, 197), (8, 6, 197), (8, 12, 197), (1, 16, 257), (1, 12, 577), (8, 12, 577), (1, 6, 1024))


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in SHAPES:
        for iters in (1, 5, 30):
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v = (torch.randn(batch, heads, tokens, 64, device=device).to(dtype) for _ in range(3))
                yield Case(
                    op="wpr_qk",
                    shape={"B": batch, "H": heads, "N": tokens, "D": 64, "iters": iters},
                    dtype=dtype,
                    variants={
                        "kernel": lambda q=q, k=k, iters=iters: ops.wpr_qk(q, k, 0.125, None, iters, 0.0),
                        "reference": lambda q=q, k=k, iters=iters: reference(q, k, 0.125, None, iters, 0.0),
                    },
                    baselines={"fused attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)},
                    bytes_moved=2 * q.numel() * q.element_size() + batch * heads * tokens * 4,
                    device=device,
                )


if __name__ == "__main__":
    main("wpr_qk", __doc__, cases)
