"""From which weight of latency on the utility chooses the R that was published, and where it keeps the dense model.

Of each device, batch and model only two points are published: the dense model and the chosen R. So this says from which
alpha on U prefers the latter, and that it does at the published alpha = 0.5. Source: arXiv 2407.05941.
"""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from tokenprune_ext.profiler.utility import choose

# dense ms, pruned ms, patch tokens, R, dense top-1, its change in points
PUBLISHED = {
    "TX2 b1 DeiT-S": (35.32, 32.12, 196, 69, 79.8, -0.99),
    "TX2 b2 DeiT-S": (68.92, 49.44, 196, 77, 79.8, -1.24),
    "TX2 b2 DeiT-B": (215.0, 146.0, 196, 70, 81.8, -1.16),
    "Orin b2 DINOv2-G": (155.5, 104.1, 256, 166, 86.5, -2.04),
    "A100 b4 DINOv2-G": (40.53, 32.37, 256, 166, 86.5, -2.04),
    "A100 b16 DINOv2-G": (155.0, 71.4, 256, 185, 86.5, -15.7),
}
STEPS = 1000


def first_alpha(name: str) -> float:
    """The smallest alpha, in thousandths, at which the published R is chosen."""
    dense_ms, pruned_ms, patches, removed, dense, change = PUBLISHED[name]
    latency = {patches: dense_ms, patches - removed: pruned_ms}
    accuracy = {patches: dense, patches - removed: dense + change}
    alphas = (step / STEPS for step in range(STEPS + 1))
    return next(alpha for alpha in alphas if choose(latency, accuracy, alpha=alpha).removed == removed)


@click.command(help=__doc__)
def main() -> None:
    table = Table("device, batch, model", "published R", "chosen from alpha", "at alpha = 0.5")
    for name, (*_, removed, _, _) in PUBLISHED.items():
        alpha = first_alpha(name)
        table.add_row(name, str(removed), f"{alpha:.3f}", f"R = {removed if alpha <= 0.5 else 0}")
    Console().print(table)


if __name__ == "__main__":
    main()
