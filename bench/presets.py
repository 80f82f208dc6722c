"""Find the schedules in tokenprune_ext/schedules: Zero-TPrune at the MACs its paper publishes.

The paper gives no keep counts. Here they are searched (`tokenprune search`) on a model whose weights are at hand, with
the MACs of the published model; blocks only, choosing tokens left out, as in the paper. Models of another resolution
take the proportions found at the nearest budget, at the strength that their own MACs ask for.

    python bench/presets.py --model vit_tiny_patch16_224 --weights FILE --data LIST --mean 0.5 --std 0.5
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.progress import Progress
from torch import nn

from tokenprune_ext import Schedule, cli_values, methods
from tokenprune_ext.data import load_images, preprocessing
from tokenprune_ext.loading import load_model
from tokenprune_ext.macs import MacsShare
from tokenprune_ext.patch import inspect_host
from tokenprune_ext.presets import FOLDER
from tokenprune_ext.prune import apply, describe
from tokenprune_ext.search import search
from tokenprune_ext.search.images import split_images
from tokenprune_ext.search.space import Space

SEARCHED_FOR = "deit_small_patch16_224"


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables: the preset's name, a timm model of its shape, GMACs of the blocks."""

    name: str
    model: str
    gmacs: float


PUBLISHED = (
    Published("deit_small_patch16_224-a", "deit_small_patch16_224", 2.97),
    Published("deit_small_patch16_224-b", "deit_small_patch16_224", 2.50),
    Published("deit_small_patch16_224-c", "deit_small_patch16_224", 3.97),
    Published("vit_small_patch16_224", "vit_small_patch16_224", 2.79),
    Published("vit_base_patch16_384-mae", "vit_base_patch16_384", 42.3),
    Published("vit_base_patch16_384-swag", "vit_base_patch16_384", 43.8),
)


def adapted(found: Schedule, model: nn.Module, budget: float) -> Schedule:
    """A schedule for a model of any size: the same keep counts where it has as many patches, else in proportion."""
    host = inspect_host(model)
    if host.num_patches == found.num_patches:
        return replace(found, model=host.model)
    direction = {layer: log(found.entering()[layer] / count) for layer, count in found.keep.items()}
    method = found.build_method()
    schedule = Space.of(model, method).schedule(direction, method, budget, MacsShare(model, scoring=False))
    assert schedule is not None
    return schedule


@click.command()
@cli_values.model_options
@click.option("--weights", type=cli_values.FILE, required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@cli_values.preprocess_options
@click.option("--trials", type=int, default=60, help="At each budget.")
@click.option("--jobs", type=int, default=2)
@click.option("--seed", type=int, default=0)
@click.option("--work", type=cli_values.FOLDER, default=Path("build/presets"), help="Where the trials are kept.")
def main(
    model_name: str,
    img_size: int | None,
    weights: Path,
    data: Path,
    trials: int,
    jobs: int,
    seed: int,
    work: Path,
    **preprocess: Any,
) -> None:
    """Search, and write one schedule file for every published point."""
    model = load_model(model_name, weights=weights, img_size=img_size)
    _, transform = preprocessing(model, img_size=img_size, **preprocess)
    images = load_images(data, model.num_classes)
    searched, held_out = split_images(images, transform, 0.5, seed, torch.bfloat16, "cpu")
    work.mkdir(parents=True, exist_ok=True)
    method = methods.create("zero_tprune")
    stands_for = {name: timm.create_model(name) for name in {row.model for row in PUBLISHED}}
    shares = {row: 1e9 * row.gmacs / describe(stands_for[row.model]).dense_blocks_macs for row in PUBLISHED}
    budgets = sorted({round(share, 4) for share in shares.values()}, reverse=True)
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=trials * len(budgets))

        def show(budget: float, done: int, least: float | None) -> None:
            text = f"{budget:.1%} of the MACs, KL {least or float('nan'):.4f}"
            progress.update(task, completed=budgets.index(budget) * trials + min(done, trials), description=text)

        result = search(
            model.to(torch.bfloat16),
            Space.of(model, method),
            MacsShare(stands_for[SEARCHED_FOR], scoring=False),
            budgets,
            searched,
            storage=work / "trials.db",
            held_out=held_out,
            trials=trials,
            jobs=jobs,
            seed=seed,
            settings={"model": model_name, "dtype": "bfloat16", "macs of": SEARCHED_FOR},
            on_progress=show,
        )
    command = f"python bench/presets.py --model {model_name} --trials {trials} --jobs {jobs} --seed {seed}"
    FOLDER.mkdir(exist_ok=True)
    for row, share in shares.items():
        found = min(result.best, key=lambda variant: abs(variant.budget - share))
        schedule = adapted(found.schedule, stands_for[row.model], share)
        macs = describe(apply(stands_for[row.model], schedule)).blocks_macs
        origin = {
            "published": f"Zero-TPrune (CVPR 2024): {row.gmacs} GMACs in the blocks of {row.model}",
            "blocks_gmacs": round(macs / 1e9, 3),
            "command": command,
            "searched_on": model_name,
            **found.schedule.origin,
        }
        replace(schedule, origin=origin).save(FOLDER / f"zero_tprune-{row.name}.json")
        click.echo(f"zero_tprune-{row.name}: {macs / 1e9:.3f} of {row.gmacs} GMACs, {schedule.keep}")
    for variant in (*result.best, *result.uniform):
        assert variant.held_out is not None
        kl, error = variant.held_out.kl, variant.held_out.kl_se or 0.0
        click.echo(f"{variant.budget:.3f} {variant.name}: KL {variant.kl:.4f}, held out {kl:.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
