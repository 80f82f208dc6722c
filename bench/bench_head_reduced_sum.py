"""Sum over channels of the reduction over heads: the kernel against its plain-torch reference.

The features are the values of a packed qkv tensor, as a block has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.head_reduced_sum import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for reduce in ("max", "mean"):
            for dtype in (torch.float32, torch.bfloat16):
                qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
                args = (qkv.permute(2, 0, 3, 1, 4)[2], reduce)
                yield Case(
                    op="head_reduced_sum",
                    shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM, "REDUCE": reduce},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.head_reduced_sum(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    bytes_moved=args[0].numel() * args[0].element_size() + batch * tokens * 4,
                    device=device,
                )


if __name__ == "__main__":
    main("head_reduced_sum", __doc__, cases)
