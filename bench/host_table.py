"""docs/hosts.md: every model of python_tests/host_models.py with every method, each combination run once."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from torch import nn

from tokenprune_ext import methods
from tokenprune_ext.patch import Host, inspect_host
from tokenprune_ext.prune import apply, remove

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "python_tests"))

from host_models import ALL_HOSTS, PRUNING, images_for, logits, make_host  # noqa: E402

TEXT = """# Models and methods

`python bench/host_table.py` writes this file. It makes a small copy of every model (3 or 4 blocks, 16 patches, random
weights), applies each method with `keep=0.7`, and runs two images. A yes says: the result is finite, it is not the
dense one, and `remove` gives the dense one back bit for bit. `pytest python_tests/patch/test_identity.py
python_tests/patch/test_hosts.py` checks more: that a patched block that removes nothing computes the bits of the dense
block, in training, in low precision and without fused attention; copies, gradients, checkpointing.

*Reads*: what the model uses or returns behind its blocks; `class_token_only` works where it is the prefix alone.
*Places*: whether blocks need to know where a token was; tokens then carry their places along. *Any size*: whether
images of another size may come; the counts of a schedule are then scaled.
"""


def outcome(model: nn.Module, host: Host, method: str) -> str:
    """Empty when the method works on the model; otherwise why it refuses it."""
    try:
        methods.create(method).for_host(host).check_host(host)
    except ValueError as error:
        return str(error).replace(host.model, "the model")
    images = images_for(model)
    dense = logits(model, images)
    pruned = logits(apply(model, method, keep=0.7), images)
    if not pruned.isfinite().all() or torch.equal(pruned[:, :1], dense[:, :1]):
        raise click.ClickException(f"{method} on {host.model}: not finite, or the dense result")
    if not torch.equal(logits(remove(model), images), dense):
        raise click.ClickException(f"{method} on {host.model}: remove does not restore")
    return ""


def row(name: str, refusals: list[str]) -> list[str]:
    """The cells of one model; a new reason for a refusal is appended to ``refusals``."""
    model = make_host(name)
    host = inspect_host(model)
    reads = "all tokens" if host.head_tokens is None else f"{host.head_tokens} of {host.num_prefix_tokens} prefix"
    cells = [name, host.model, reads, "yes" if host.positional else "", "yes" if host.dynamic else ""]
    for method in PRUNING:
        reason = outcome(model, host, method)
        if reason and reason not in refusals:
            refusals.append(reason)
        cells.append(f"no ({refusals.index(reason) + 1})" if reason else "yes")
    return cells


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "hosts.md", show_default=True)
@torch.no_grad()
def main(output: Path) -> None:
    torch.set_num_threads(1)
    refusals: list[str] = []
    head = ["name in `host_models.py`", "model", "reads", "places", "any size", *(f"`{name}`" for name in PRUNING)]
    rows = [head, ["---"] * len(head), *(row(name, refusals) for name in ALL_HOSTS)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(refusals, 1))
    output.write_text(f"{TEXT}\n{table}\n\n{notes}\n", "utf-8")
    click.echo(f"{output}: {len(rows) - 2} models, {len(PRUNING)} methods")


if __name__ == "__main__":
    main()
