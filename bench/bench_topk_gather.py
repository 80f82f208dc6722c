"""Selection and gather of the best tokens: the kernel against its plain-torch reference and against eager torch.

Half of the patch tokens are kept; the others are dropped, or averaged into one more token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import token_shapes
from torch import Tensor

from tokenprune_ext import ops
from tokenprune_ext.ops.topk_gather import reference

PREFIX = 1


def eager(x: Tensor, scores: Tensor, keep: int, fuse: str) -> tuple[Tensor, Tensor]:
    """As one would write it in a model: topk, sort, gather. Which of equal scores wins is not defined."""
    patches = scores[:, PREFIX:]
    kept = patches.topk(keep, dim=1).indices.sort(1).values + PREFIX
    parts = [x[:, :PREFIX], _take(x, kept)]
    if fuse == "mean":
        dropped = patches.topk(patches.shape[1] - keep, dim=1, largest=False).indices + PREFIX
        parts.append(_take(x, dropped).mean(1, keepdim=True))
    return torch.cat(parts, 1), kept


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def cases(device: str) -> Iterator[Case]:
    for batch, tokens, channels in token_shapes(device):
        keep = (tokens - PREFIX) // 2
        # Distinct scores, so that every formulation keeps the same tokens.
        scores = torch.rand(batch, tokens, device=device).argsort(1).float()
        for fuse in ("none", "mean"):
            read = tokens if fuse == "mean" else PREFIX + keep  # what is dropped need not be read
            written = PREFIX + keep + int(fuse == "mean")
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(batch, tokens, channels, device=device).to(dtype)
                args = (x, scores, keep)
                yield Case(
                    op="topk_gather",
                    shape={"B": batch, "N": tokens, "C": channels, "FUSE": fuse},
                    dtype=dtype,
                    variants={
                        "kernel": lambda args=args, fuse=fuse: ops.topk_gather(*args, PREFIX, fuse),
                        "reference": lambda args=args, fuse=fuse: reference(*args, PREFIX, fuse),
                        "eager": lambda args=args, fuse=fuse: eager(*args, fuse),
                    },
                    bytes_moved=batch * ((read + written) * channels * x.element_size() + tokens * 4 + keep * 8),
                    tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                    device=device,
                )


if __name__ == "__main__":
    main("topk_gather", __doc__, cases)
