"""What a block costs beside its arithmetic: eager, on a model so small that little else is left of it.

In microseconds: a dense block of timm's, a block behind a pruning one, and a pruning one. Python and torch's dispatcher
bound the latency of small batches on a GPU, unless a CUDA graph or a compiled model leaves them out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from harness import append
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer

from tokenprune_ext import apply, methods
from tokenprune_ext.compare import DENSE, share
from tokenprune_ext.environment import environment
from tokenprune_ext.latency import quantile, time_in_turns

BLOCKS = (DENSE, "behind", "pruning")


def overheads(method: str, device: str, budget_s: float, no_grad: bool = False) -> dict[str, Any]:
    """Median seconds of a call of each of ``BLOCKS``, timed in turns, under inference mode or ``torch.no_grad``."""
    dense = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=6).eval().to(device)
    model = apply(share(dense), method, layers=(0,), keep=(9,))
    x = torch.randn(1, 17, 48, device=device)
    with torch.no_grad() if no_grad else torch.inference_mode():
        pruned = model.blocks[0](x)
        calls = (partial(dense.blocks[0], x), partial(model.blocks[1], pruned), partial(model.blocks[0], x))
        times = time_in_turns(dict(zip(BLOCKS, calls, strict=True)), cuda=device == "cuda", budget_s=budget_s)
    mode = "no_grad" if no_grad else "inference_mode"
    return {"method": method, "mode": mode, **{f"{name}_s": quantile(rounds, 0.5) for name, rounds in times.items()}}


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--budget", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds a method.")
@click.option("--no-grad", is_flag=True, help="Under torch.no_grad instead of torch.inference_mode.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the records to this JSON-lines file.")
def main(device: str, budget: float, no_grad: bool, output: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = [name for name in methods.available() if name != DENSE]
    records = [overheads(name, device, budget, no_grad) for name in names]
    table = Table("method", *(f"{name}, us" for name in BLOCKS))
    for record in records:
        table.add_row(record["method"], *(f"{record[f'{name}_s'] * 1e6:.0f}" for name in BLOCKS))
    Console(width=120).print(table)
    if output:
        append(output, records, environment(torch.device(device)))


if __name__ == "__main__":
    main()
