"""The parameter and MAC columns of VTP's tables for DeiT-B: which kept widths they imply, and that ours reach them.

A rate says how many of all channels go (7 C a block: C at three places, 4 C in the MLP), and not where. Were the share
the same at every place, parameters and MACs would be those of `uniform`. `implied` are the widths nearest to uniform
(least squares over all channels, the same in every block) that have the published parameters, or come nearest. A DeiT-B
with gates that ask for them is then pruned at the rate, and counted. MACs are the whole model's.
Source: arXiv 2104.08500.

    python bench/vtp_columns.py
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tokenprune_ext import vtp
from tokenprune_ext.prune import describe

DEPTH, CHANNELS, TOKENS = 12, 768, 197
STEP = 12  # of the widths that are tried
TOLERANCE = 0.001  # of the parameters they have


@dataclass(frozen=True)
class Row:
    """A published row: classes of the data set, rate, millions of parameters, GMACs."""

    classes: int
    rate: float
    parameters: float
    macs: float


PUBLISHED = (
    Row(1000, 0.2, 67.3, 13.8),
    Row(1000, 0.4, 48.0, 10.0),
    Row(100, 0.2, 66.1, 13.7),
    Row(100, 0.4, 47.3, 10.0),
    Row(100, 0.5, 38.0, 8.2),
    Row(100, 0.6, 29.0, 6.4),
)


def counted(classes: int, qkv: np.ndarray, proj: np.ndarray, fc1: np.ndarray, hidden: np.ndarray) -> tuple:
    """Parameters in millions and GMACs of a DeiT-B with these widths, by the shapes that are left."""
    weights = qkv * (2 * CHANNELS + proj) + CHANNELS * proj + fc1 * hidden + CHANNELS * hidden
    biases_and_norms = (2 * CHANNELS + proj) + CHANNELS + hidden + CHANNELS + 4 * CHANNELS
    outside = 16 * 16 * 3 * CHANNELS + CHANNELS + CHANNELS + TOKENS * CHANNELS + 2 * CHANNELS + (CHANNELS + 1) * classes
    parameters = DEPTH * (weights + biases_and_norms) + outside
    products = TOKENS * weights + 2 * TOKENS**2 * CHANNELS  # heads keep their shape
    macs = DEPTH * products + (TOKENS - 1) * 16 * 16 * 3 * CHANNELS + CHANNELS * classes
    return parameters / 1e6, macs / 1e9


def uniform(rate: float) -> tuple[int, int, int, int]:
    """The widths with the same share at every place."""
    return (*[round((1 - rate) * CHANNELS)] * 3, round((1 - rate) * 4 * CHANNELS))  # type: ignore[return-value]


def implied(row: Row) -> tuple[int, int, int, int]:
    """The widths nearest to uniform with the rate and the parameters of a row."""
    axis = np.arange(STEP, CHANNELS + 1, STEP)
    qkv, proj, fc1 = np.meshgrid(axis, axis, axis, indexing="ij")
    hidden = round(7 * CHANNELS * (1 - row.rate)) - qkv - proj - fc1
    parameters, _ = counted(row.classes, qkv, proj, fc1, hidden)
    same = uniform(row.rate)
    far = sum((widths - width) ** 2 for widths, width in zip((qkv, proj, fc1), same[:3], strict=True))
    far = far + (hidden - same[3]) ** 2 / 4  # four times the channels, so a quarter of the difference in share, squared
    possible = (hidden >= 1) & (hidden <= 4 * CHANNELS)
    off = np.where(possible, abs(parameters / row.parameters - 1), np.inf)
    fits = off <= max(TOLERANCE, off.min())
    best = np.unravel_index(np.where(fits, far, np.inf).argmin(), far.shape)
    return tuple(int(widths[best]) for widths in (qkv, proj, fc1, hidden))  # type: ignore[return-value]


def pruned(row: Row, widths: tuple[int, ...]) -> nn.Module:
    """A DeiT-B pruned at the rate of a row, whose gates are above the threshold in as many channels as given."""
    model = vtp.add_gates(timm.create_model("deit_base_patch16_224", num_classes=row.classes).eval())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, gate in enumerate(vtp.gates_of(model).values()):
            order = torch.randperm(len(gate), generator=generator)
            gate.copy_(0.5 + 0.5 * torch.rand(len(gate), generator=generator))
            gate[order[widths[index % len(widths)] :]] *= 0.5
    return vtp.prune(model, row.rate)


@click.command(help=__doc__)
def main() -> None:
    table = Table("classes", "rate", "published", "uniform", "implied: qkv, proj, fc1, fc2", "ours", "off")
    for row in PUBLISHED:
        published = row.parameters, row.macs
        even = counted(row.classes, *map(np.asarray, uniform(row.rate)))
        widths = implied(row)
        model = pruned(row, widths)
        found = vtp.report(model).parameters / 1e6, describe(model).model_macs / 1e9
        shares = [f"{width / full:.0%}" for width, full in zip(widths, (*[CHANNELS] * 3, 4 * CHANNELS), strict=True)]
        off = [f"{100 * (mine / theirs - 1):+.1f} %" for mine, theirs in zip(found, published, strict=True)]
        table.add_row(
            str(row.classes),
            f"{row.rate:.0%}",
            "{:.1f} M, {:.1f} G".format(*published),
            "{:.1f} M, {:.1f} G".format(*even),
            ", ".join(shares),
            "{:.1f} M, {:.2f} G".format(*found),
            ", ".join(off),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
