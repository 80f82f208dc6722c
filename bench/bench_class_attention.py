"""The class token's attention, with and without value lengths: the kernel against its plain-torch reference.

Queries, keys and values are views of a packed qkv tensor, as a block has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.class_attention import reference

SCALE = HEAD_DIM**-0.5


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
            q, k, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            for v in (values, None):
                read = k.numel() * (1 if v is None else 2)
                yield Case(
                    op="class_attention",
                    shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM, "LENGTHS": v is not None},
                    dtype=dtype,
                    variants={
                        "kernel": lambda q=q, k=k, v=v: ops.class_attention(q, k, SCALE, v),
                        "reference": lambda q=q, k=k, v=v: reference(q, k, v, None, SCALE),
                    },
                    bytes_moved=read * k.element_size() + batch * tokens * 4,
                    flops=2 * read,
                    device=device,
                )


if __name__ == "__main__":
    main("class_attention", __doc__, cases)
