"""Attention with log(size) added to the logits of every key, as merging methods need it, in two ways.

``kernel`` is what pruned models do: a mask broadcast over heads and queries. ``one more channel`` puts the same into
queries (1) and keys (log(size) / scale) and pads the channels to the next multiple of 8, so that a fused attention that
takes no mask can be used. ``no sizes`` is the attention of the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from shapes import HEAD_DIM, attention_shapes
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SCALE = HEAD_DIM**-0.5


def _one_more_channel(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    column = (log_size / SCALE).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    q, k = pad(pad(q, (0, 1), value=1.0), (0, 7)), pad(torch.cat([k, column], -1), (0, 7))
    return scaled_dot_product_attention(q, k, pad(v, (0, 8)), scale=SCALE)[..., :HEAD_DIM]


def cases(device: str) -> Iterator[Case]:
    for batch, heads, tokens in attention_shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(batch, heads, tokens, HEAD_DIM, device=device).to(dtype) for _ in range(3))
            log_size = torch.randint(1, 9, (batch, tokens), device=device).log2().round()  # exact in bfloat16
            bias = log_size.to(dtype)[:, None, None, :]
            args = (q, k, v, log_size)
            yield Case(
                op="log_size_attention",
                shape={"B": batch, "H": heads, "N": tokens, "D": HEAD_DIM},
                dtype=dtype,
                variants={
                    "kernel": lambda q=q, k=k, v=v, bias=bias: scaled_dot_product_attention(q, k, v, attn_mask=bias),
                    "one more channel": lambda args=args: _one_more_channel(*args),
                },
                baselines={"no sizes": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v)},
                bytes_moved=4 * q.numel() * q.element_size() + bias.numel() * bias.element_size(),
                flops=4 * batch * heads * tokens**2 * HEAD_DIM,
                tolerance=1e-4 if dtype == torch.float32 else 2e-2,
                device=device,
            )


if __name__ == "__main__":
    main("log_size_attention", __doc__, cases, compiled=False)
