"""Sampling at quantiles, copies and padding: the kernel against its plain-torch reference and against eager torch.

There are half as many quantiles as patch tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import token_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.quantile_gather import reference

PREFIX = 1


def eager(x: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As one would write it in a model."""
    sums = scores[:, PREFIX:].cumsum(1, dtype=torch.float64)
    quantile = torch.arange(keep, device=x.device) + 0.5
    index = torch.searchsorted(keep * sums, quantile * sums[:, -1:])
    sampled = torch.zeros_like(scores[:, PREFIX:]).scatter(1, index, 1.0)
    kept = sampled.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
    size = torch.nn.functional.pad(sampled.gather(1, kept), (PREFIX, 0), value=1.0)
    kept = kept + PREFIX
    tokens = torch.cat([x[:, :PREFIX], x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))], 1)
    return tokens, kept, size, size.log().to(x.dtype)[:, None, None]


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in token_shapes(device):
        keep = (tokens - PREFIX) // 2
        rows = PREFIX + keep
        # Whole numbers, whose sums are exact, so that every formulation samples the same tokens.
        scores = (torch.rand(batch, tokens, device=device).pow(8) * 1000).floor()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(batch, tokens, channels, device=device).to(dtype)
            args = (x, scores, keep)
            size = x.element_size()
            yield Case(
                op="quantile_gather",
                shape={"B": batch, "N": tokens, "C": channels},
                dtype=dtype,
                variants={
                    "kernel": lambda args=args: ops.quantile_gather(*args, PREFIX),
                    "reference": lambda args=args: reference(*args, PREFIX),
                    "eager": lambda args=args: eager(*args),
                },
                bytes_moved=batch * (2 * rows * channels * size + tokens * 4 + keep * 8 + rows * (4 + size)),
                device=device,
            )


if __name__ == "__main__":
    main("quantile_gather", __doc__, cases)
