"""Combination of per-head scores: the kernel against its plain-torch reference.

Scores come from `wpr` and are float32 whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import attention_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.head_aggregate import reference


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        # Variance 1/3 for even heads, 4/3 for odd ones: the filter, at most 0.7 here, has something to do.
        spread = torch.arange(heads, device=device).remainder(2).add(1).view(-1, 1)
        scores = 1 + spread * torch.rand(batch, heads, tokens, device=device).mul(2).sub(1)
        args = (scores, 0.01, 0.7, 1)
        yield Case(
            op="head_aggregate",
            shape={"B": batch, "H": heads, "N": tokens},
            dtype=torch.float32,
            variants={
                "kernel": lambda args=args: ops.head_aggregate(*args),
                "reference": lambda args=args: reference(*args),
            },
            bytes_moved=(scores.numel() + batch * tokens) * 4,
            device=device,
        )


if __name__ == "__main__":
    main("head_aggregate", __doc__, cases)
