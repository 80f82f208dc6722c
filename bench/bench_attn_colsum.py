"""Attention received, from a given attention matrix: the kernel against its plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import READ, Case, main
from shapes import attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.attn_colsum import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            attn = torch.randn(batch, heads, tokens, tokens, device=device).softmax(-1).to(dtype)
            for reduce in ("max", "mean"):
                args = (attn, reduce, "patch", 1)
                yield Case(
                    op="attn_colsum",
                    shape={"B": batch, "H": heads, "N": tokens, "REDUCE": reduce},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.attn_colsum(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    baselines={READ: lambda attn=attn: attn.sum()},
                    bytes_moved=attn.numel() * attn.element_size() + batch * tokens * 4,
                    device=device,
                )


if __name__ == "__main__":
    main("attn_colsum", __doc__, cases)
