"""The tables of docs/predict.md: predicted edges of three models on three devices, and the choices of arXiv 2407.05941.

On paper, from the descriptions in tokenprune_ext/profiler/devices: nothing is measured. Published figures are those of
the paper's tables. Every count here is of all tokens, the class token among them, as in the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from tokenprune_ext.loading import load_model
from tokenprune_ext.profiler.device import Device, Tile, load_device
from tokenprune_ext.profiler.predict import Prediction, predict

DOCS = Path(__file__).resolve().parents[1] / "docs" / "predict.md"
BEGIN, END = "<!-- python bench/predicted_edges.py -->\n", "<!-- end of the tables -->"
MODELS = {"DeiT-S": "deit_small_patch16_224", "DeiT-B": "deit_base_patch16_224", "DINOv2-G": "vit_giant_patch14_dinov2"}
DEVICES = {"A100": "a100", "AGX Orin": "orin", "TX2": "tx2"}
WIDE = {"A100": "tf32", "AGX Orin": "tf32", "TX2": "float32"}  # what frameworks may make of float32 there
BATCH_SIZES = (1, 2, 4)
NEAR = 2  # tokens


@dataclass(frozen=True)
class Published:
    """A choice of the paper, with its latencies in ms, dense and pruned."""

    model: str
    device: str
    batch_size: int
    removed: int
    dense_ms: float
    pruned_ms: float


PUBLISHED = (
    Published("DeiT-S", "TX2", 1, 69, 35.32, 32.12),
    Published("DeiT-B", "TX2", 2, 70, 215.0, 146.0),
    Published("DeiT-S", "TX2", 2, 77, 68.92, 49.44),
    Published("DINOv2-G", "AGX Orin", 2, 166, 155.5, 104.1),
    Published("DINOv2-G", "A100", 4, 166, 40.53, 32.37),
    Published("DINOv2-G", "A100", 16, 185, 155.0, 71.4),
)


def _tiles(change: Callable[[Tile], Tile]) -> Callable[[Device], Device]:
    return lambda device: replace(device, gemm_tiles=tuple(change(tile) for tile in device.gemm_tiles))


# Other assumptions where the descriptions assume.
VARIANTS: dict[str, Callable[[Device], Device]] = {
    "as described": lambda device: device,
    "every shape at the peak rate": _tiles(lambda tile: replace(tile, rate=1.0)),
    "one block per SM": _tiles(lambda tile: replace(tile, blocks_per_sm=1)),
    "no shape below 128 x 64": lambda device: replace(
        device, gemm_tiles=tuple(tile for tile in device.gemm_tiles if tile.rows * tile.columns >= 128 * 64)
    ),
}


@functools.cache
def model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return load_model(MODELS[name], img_size=224)


@functools.cache
def prediction(
    name: str, device: str, batch_size: int, dtype: str = "float16", variant: str = "as described"
) -> Prediction:
    described = VARIANTS[variant](load_device(DEVICES[device]))
    return predict(model(name), described, batch_size=batch_size, dtype=dtype)


def edges(found: Prediction) -> dict[int, float]:
    """All tokens at each edge, and how much the latency falls there."""
    return {found.num_prefix_tokens + edge.tokens: edge.fall for edge in found.edges}


def all_edges() -> list[list[str]]:
    rows = [["model", "device", "batch", "edges: all tokens, and the fall of the latency there"]]
    for name in MODELS:
        for device in DEVICES:
            for batch_size in BATCH_SIZES:
                found = edges(prediction(name, device, batch_size))
                said = ", ".join(f"{count} (-{fall:.0%})" for count, fall in sorted(found.items(), reverse=True))
                rows.append([name, device, str(batch_size), said or "none"])
    return rows


def choices() -> list[list[str]]:
    head = ["model, device, batch", "chosen: R, tokens left", "nearest edges", "on an edge", "with other assumptions"]
    head += ["below the next", "chance", "pruned / dense: predicted, published", "dense ms: predicted, published"]
    rows = [head]
    for one in PUBLISHED:
        found = prediction(one.model, one.device, one.batch_size)
        wide = prediction(one.model, one.device, one.batch_size, WIDE[one.device])
        dense = found.num_prefix_tokens + found.tokens[-1]
        left = dense - one.removed
        counts = edges(found)
        others = [prediction(one.model, one.device, one.batch_size, variant=name) for name in list(VARIANTS)[1:]]
        around = [max((c for c in counts if c < left), default=None), min(c for c in counts if c >= left)]
        below = _below(left, counts)
        chance = sum(_below(count, counts) <= below for count in range(found.num_prefix_tokens + 1, dense + 1))
        ratio = wide.latency_s[left - found.num_prefix_tokens - 1] / wide.latency_s[-1]
        rows.append(
            [
                f"{one.model}, {one.device}, {one.batch_size}",
                f"{one.removed}, {left}",
                ", ".join(str(count) for count in around if count is not None),
                _on_edge(left, counts),
                ", ".join(_on_edge(left, edges(other)) for other in others),
                str(below),
                f"{chance / found.tokens[-1]:.0%}",
                f"{ratio:.2f}, {one.pruned_ms / one.dense_ms:.2f}",
                f"{found.latency_s[-1] * 1e3:.3g} (float16), {wide.latency_s[-1] * 1e3:.3g} ({WIDE[one.device]}), "
                f"{one.dense_ms:g}",
            ]
        )
    return rows


def _on_edge(count: int, counts: dict[int, float]) -> str:
    return "yes" if any(abs(edge - count) <= NEAR for edge in counts) else "no"


def _below(count: int, counts: dict[int, float]) -> float:
    """How many tokens below the next edge a count is."""
    return min((edge - count for edge in counts if edge >= count), default=float("inf"))


def tables() -> str:
    return f"{_markdown(all_edges())}\n\n{_markdown(choices())}\n"


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=DOCS, show_default=True)
def main(output: Path) -> None:
    before, _, rest = output.read_text("utf-8").partition(BEGIN)
    if END not in rest:
        raise click.ClickException(f"{output} has no place for the tables: {BEGIN.strip()} ... {END}")
    output.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}", "utf-8")
    click.echo(f"wrote the tables of {output}")


if __name__ == "__main__":
    main()
