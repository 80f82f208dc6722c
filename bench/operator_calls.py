"""One small call of every operator.

usage: operator_calls.py DEVICE      makes all calls once a dtype; for tools that watch kernels, like compute-sanitizer
"""

from __future__ import annotations

import sys
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def operator_calls(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """The arguments of every operator by its name."""
    attn = torch.randn(2, 3, 33, 33, device=device).softmax(-1).to(dtype)
    x, scores = torch.randn(2, 33, 16, device=device).to(dtype), torch.rand(2, 33, device=device)
    kept = torch.tensor([[2, 5, 6, 30], [1, 2, 3, 32]], device=device)
    dropped = torch.tensor([[7, 1, 9], [4, 5, 6]], device=device)
    match = torch.tensor([[5, 2, 5], [3, 3, 3]], device=device)
    rank = scores.argsort(1).argsort(1)
    q, k = (torch.randn(2, 3, 33, 16, device=device).to(dtype) for _ in range(2))
    among = torch.arange(2, 33, device=device).repeat(2, 1)
    start = torch.ones(33, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return {
        "wpr": (attn, start, 5, 1e-6),
        "attn_colsum": (attn, "max", "patch", 1),
        "class_attention": (q, k, k, None, 0.25, "mean"),
        "head_aggregate": (torch.rand(2, 3, 33, device=device).to(dtype), 0.01, 0.7, 1),
        "head_reduced_sum": (q, "max"),
        "topk_gather": (x, scores, 10, 1, "mean"),
        "quantile_gather": (x, scores, 10, 1),
        "merge_tokens": (x, scores.to(start.dtype), kept, dropped, match, 1),
        "attn_colsum_qk": (q, k, 0.25, "max", "patch", 1),
        "wpr_qk": (q, k, 0.25, start[:32], 5, 1e-6, among, 1),
        "zero_tprune": (q, k, k, 0.25, 5, True, 5, 1e-6, 0.01, 0.7, 1),
        "nearest_token": (x, rank, 1),
        "peaks_match": (x, scores.to(start.dtype), 10, 1, 2.0),
        "bipartite_match": (q, scores, 10, 1, "unimportant"),
    }


if __name__ == "__main__":
    import tokenprune_ext  # noqa: F401  defines the operators

    device = sys.argv[1]
    for dtype in DTYPES:
        for name, args in operator_calls(device, dtype).items():
            getattr(torch.ops.tokenprune, name)(*args)
        print(f"every operator called once on {device} in {dtype}")
    if device == "cuda":
        torch.cuda.synchronize()
