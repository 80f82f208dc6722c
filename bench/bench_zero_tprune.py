"""A pruning layer of Zero-TPrune: the kernel against its plain-torch reference, which forms the matrix twice.

Ten tokens are dropped; tol is 0, so that every variant makes all its iterations. The operators that the stages consist
of, called one after the other, are timed beside it. Compared is the sum of the scores: which tokens are dropped may
hang on rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.zero_tprune import reference, start_scores

PREFIX = 1
DROPPED = 10
ITERS = 5
FILTER = (0.01, 0.7)


def stages(q: Tensor, k: Tensor, start: Tensor, left_start: Tensor) -> Tensor:
    """The scores of the tokens that are left, by the operators that the stages consist of."""
    rough = ops.head_aggregate(ops.wpr_qk(q, k, 0.125, start, 1), *FILTER, PREFIX)
    _, _, kept = ops.bipartite_match(k, rough, DROPPED, PREFIX, "unimportant")
    ranks = ops.wpr_qk(q, k, 0.125, left_start, ITERS, 0.0, kept, PREFIX)
    return ops.head_aggregate(ranks, *FILTER, PREFIX)


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            # Views of one packed tensor, as in a model.
            packed = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device).to(dtype)
            q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
            args = (q, k, k, 0.125, DROPPED, True, ITERS, 0.0, *FILTER, PREFIX)
            starts = [start_scores(q, count) for count in (tokens, tokens - DROPPED)]
            yield Case(
                op="zero_tprune",
                shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM},
                dtype=dtype,
                variants={
                    "kernel": lambda args=args: ops.zero_tprune(*args)[0],
                    "reference": lambda args=args: reference(*args)[0],
                    "operators": lambda q=q, k=k, starts=starts: stages(q, k, *starts),
                },
                bytes_moved=2 * q.numel() * q.element_size() + batch * tokens * 4,
                flops=(2 * HEAD_DIM + 2 * (1 + ITERS)) * batch * heads * tokens**2,
                compared=lambda scores: scores.clamp_min(0).sum(1),
                tolerance=1e-3 if dtype == torch.float32 else 4e-3,
                device=device,
            )


if __name__ == "__main__":
    main("zero_tprune", __doc__, cases)
