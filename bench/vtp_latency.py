"""How much faster a model with fewer channels is, and how far the table of widths is off.

Gates are random, so that no accuracy is meant: only widths count, and they are spread as a random threshold does. Dense
and smaller models are timed in turns; ratios are to the dense model.

    python bench/vtp_latency.py --model deit_small_patch16_224 --batch-size 8
"""

from __future__ import annotations

import click
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tokenprune_ext import vtp
from tokenprune_ext.latency import keep_freed_memory, measure_latency
from tokenprune_ext.prune import describe


def gated(model: nn.Module) -> nn.Module:
    """Gates of random size, seeded."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in vtp.gates_of(vtp.add_gates(model)).values():
            gate.copy_(torch.rand(len(gate), generator=generator))
    return model


@click.command(help=__doc__)
@click.option("--model", "name", default="deit_small_patch16_224")
@click.option("--batch-size", default=8)
@click.option("--device", default="cpu")
@click.option("--align", default=1)
@click.option("--rates", default="0.2,0.4,0.6")
@click.option("--budget", default=30.0, help="seconds to time for, for the table and for the models")
def main(name: str, batch_size: int, device: str, align: int, rates: str, budget: float) -> None:
    keep_freed_memory(device)
    dense = timm.create_model(name).eval().to(device)
    model = gated(timm.create_model(name).eval()).to(device)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    widths = vtp.measure_widths(model, images, align=align, budget_s=budget)
    models = {"dense": dense, **{rate: vtp.prune(model, float(rate), align) for rate in rates.split(",")}}
    found = measure_latency(models, images, budget_s=budget)
    whole = widths.estimate(vtp.widths_of(dense)), describe(dense).model_macs
    table = Table("rate", "parameters", "MACs", "time of dense", "estimated")
    for rate, each in models.items():
        macs, seconds = describe(each).model_macs / whole[1], widths.estimate(vtp.widths_of(each)) / whole[0]
        parameters = f"{vtp.report(each).parameters / 1e6:.1f} M"
        table.add_row(rate, parameters, f"{macs:.3f}", f"{1 / found[rate].speedup:.3f}", f"{seconds:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
