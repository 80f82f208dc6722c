"""Peaks: the kernel against its plain-torch reference, which forms all N x N similarities twice.

Three quarters of the patch tokens are kept. Only the scores are compared: where two are equal up to rounding, what is
kept may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import token_shapes

from tokenprune_ext import ops
from tokenprune_ext.ops.peaks_match import reference

PREFIX = 1


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in token_shapes(device):
        keep, patches = (tokens - PREFIX) * 3 // 4, tokens - PREFIX
        importance = torch.rand(batch, tokens, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
            args = (metric, importance, keep, PREFIX)
            yield Case(
                op="peaks_match",
                shape={"B": batch, "N": tokens, "D": channels, "K": keep},
                dtype=dtype,
                variants={
                    "kernel": lambda args=args: ops.peaks_match(*args)[0],
                    "reference": lambda args=args: reference(*args)[0],
                },
                bytes_moved=metric.numel() * metric.element_size() + batch * tokens * 24,
                flops=batch * channels * patches * (patches - 1),  # every pair once
                device=device,
            )


if __name__ == "__main__":
    main("peaks_match", __doc__, cases)
