"""Bipartite matching: the kernel against its plain-torch reference, which stores the similarities between the groups.

A quarter of the tokens is dropped. Shapes: keys of one head (D = 64) and tokens (D = 384) of DeiT-S at 224,
keys at 384.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from tokenprune_ext import ops
from tokenprune_ext.ops.bipartite_match import reference

SHAPES = ((1, 197, 64), (8, 197, 64), (1, 197, 384), (8, 197, 384), (1, 577, 64), (8, 577, 64))


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in SHAPES:
        importance = torch.rand(batch, tokens, device=device)
        r = tokens // 4
        for partition, scores in (("alternate", None), ("unimportant", importance)):
            for dtype in (torch.float32, torch.bfloat16):
                metric = torch.randn(batch, tokens, channels, device=device).to(dtype)
                args = (metric, scores, r, 1, partition)
                yield Case(
                    op="bipartite_match",
                    shape={"B": batch, "N": tokens, "D": channels, "PARTITION": partition},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args: ops.bipartite_match(*args),
                        "reference": lambda args=args: reference(*args),
                    },
                    bytes_moved=metric.numel() * metric.element_size() + batch * (tokens - 1 + r) * 8,
                    device=device,
                )


if __name__ == "__main__":
    main("bipartite_match", __doc__, cases)
