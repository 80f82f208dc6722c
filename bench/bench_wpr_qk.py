"""Weighted page rank from queries and keys: the kernel against its plain-torch reference, which forms the matrix.

tol is 0, so that every variant makes all its iterations. Fused attention on the same q, k, v is timed beside it. A
matrix that does not fit on chip is formed again in every iteration; a CPU holds what fits 48 MiB of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.wpr_qk import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for iters in (1, 5, 30):
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v = (torch.randn(batch, heads, tokens, HEAD_DIM, device=device).to(dtype) for _ in range(3))
                yield Case(
                    op="wpr_qk",
                    shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM, "iters": iters},
                    dtype=dtype,
                    variants={
                        "kernel": lambda q=q, k=k, iters=iters: ops.wpr_qk(q, k, 0.125, None, iters, 0.0),
                        "reference": lambda q=q, k=k, iters=iters: reference(q, k, 0.125, None, iters, 0.0),
                    },
                    baselines={"fused attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)},
                    bytes_moved=2 * q.numel() * q.element_size() + batch * heads * tokens * 4,
                    # Two passes form the matrix, then each iteration reads it. A kernel that cannot hold it forms it
                    # in every iteration: that work is not in the floor.
                    flops=(4 * HEAD_DIM + 2 * iters) * batch * heads * tokens**2,
                    # On chip, a GPU holds the probabilities of 16-bit inputs in float16.
                    tolerance=1e-4 if dtype == torch.float32 else 4e-3,
                    device=device,
                )


if __name__ == "__main__":
    main("wpr_qk", __doc__, cases)
