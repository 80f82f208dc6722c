"""Attention received from queries and keys: the kernel against its plain-torch reference, which forms the matrix.

Fused attention on the same q, k, v is timed beside it: the score costs about as much as attention itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.attn_colsum_qk import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for reduce in ("max", "mean"):
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v = (torch.randn(batch, heads, tokens, HEAD_DIM, device=device).to(dtype) for _ in range(3))
                args = (q, k, 0.125, reduce, "patch", 1)
                yield Case(
                    op="attn_colsum_qk",
                    shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM, "REDUCE": reduce},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.attn_colsum_qk(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    baselines={"fused attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)},
                    bytes_moved=2 * q.numel() * q.element_size() + batch * tokens * 4,
                    flops=4 * batch * heads * tokens**2 * HEAD_DIM,  # two passes: the sums of the rows come first
                    device=device,
                )


if __name__ == "__main__":
    main("attn_colsum_qk", __doc__, cases)
