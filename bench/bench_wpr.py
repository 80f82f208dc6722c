"""Weighted page rank: the kernel against its plain-torch reference.

tol is 0, so that every variant makes all its iterations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import READ, Case, main
from shapes import attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.wpr import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for iters in (1, 5, 30):
            for dtype in (torch.float32, torch.bfloat16):
                attn = torch.randn(batch, heads, tokens, tokens, device=device).softmax(-1).to(dtype)
                yield Case(
                    op="wpr",
                    shape={"B": batch, "H": heads, "N": tokens, "iters": iters},
                    dtype=dtype,
                    variants={
                        "kernel": lambda attn=attn, iters=iters: ops.wpr(attn, None, iters, 0.0),
                        "reference": lambda attn=attn, iters=iters: reference(attn, None, iters, 0.0),
                    },
                    baselines={READ: lambda attn=attn: attn.sum()},
                    bytes_moved=attn.numel() * attn.element_size() + attn[..., 0].numel() * 4,
                    device=device,
                )


if __name__ == "__main__":
    main("wpr", __doc__, cases)
