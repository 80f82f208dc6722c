"""Peak memory of the operators that score from queries and keys, beyond their inputs: the process before and after.

The attention matrix of the default shape would be 2 GB in float32.
"""

from __future__ import annotations

import resource

import click
import torch

from tokenprune_ext import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command(help=__doc__)
@click.option("--op", type=click.Choice(["attn_colsum_qk", "wpr_qk", "zero_tprune"]), required=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--heads", default=16, show_default=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
def main(op: str, device: str, batch: int, heads: int, tokens: int, dtype: str) -> None:
    q, k = (torch.randn(batch, heads, tokens, 64, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    calls = {
        "attn_colsum_qk": lambda q, k: ops.attn_colsum_qk(q, k, 0.125, "max", "patch", 1),
        "wpr_qk": lambda q, k: ops.wpr_qk(q, k, 0.125, None, 2, 0.0),
        "zero_tprune": lambda q, k: ops.zero_tprune(q, k, k, 0.125, 10, True, 2, 0.0, num_prefix=1),
    }
    calls[op](q[:1, :1, :64], k[:1, :1, :64])  # whatever the first call sets up
    before = peak_mb(device)
    calls[op](q, k)
    matrix = batch * heads * tokens**2 * q.element_size() / 2**20
    extra = peak_mb(device) - before
    print(f"{op} B={batch} H={heads} N={tokens} {dtype} {device}: {extra:.1f} MiB (the matrix: {matrix:.0f})")


if __name__ == "__main__":
    main()
