"""What training buys: models with fewer channels and learned token pruning, on the package's images and small model.

Every model but the narrower ones starts from the package's. All of a seed are trained on as many images, in folders of
their own: a command that was interrupted goes on. Then all of them are evaluated and timed side by side.

    python bench/training.py --output RUNS --seed 0 --seed 1      # two seeds, then the table of all there are
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from harness import append
from timm.data.transforms_factory import create_transform
from torch import nn

from tokenprune_ext import apply, demo, vtp
from tokenprune_ext.compare import share
from tokenprune_ext.data import batches
from tokenprune_ext.demo import DemoImages
from tokenprune_ext.demo.images import IMAGE_SIZE
from tokenprune_ext.demo.model import initialise, vit_demo
from tokenprune_ext.dynamicvit.objective import DynamicViTObjective
from tokenprune_ext.environment import environment
from tokenprune_ext.evaluate import evaluate
from tokenprune_ext.files import replacing
from tokenprune_ext.latency import keep_freed_memory, measure_latency
from tokenprune_ext.prune import describe
from tokenprune_ext.train import CrossEntropy, Objective, Options, TrainingData, train
from tokenprune_ext.vtp.objective import SparsityObjective
from tokenprune_ext.vtp.ranking import Ranking

RATES = (0.2, 0.4, 0.6)
TOKENS = ("auto", "zero_tprune", "tome")  # on top of fewer channels
UNTRAINED = ("zero_tprune", "evit", "auto")  # beside DynamicViT, with its tokens
KEEP, MACS = 0.7, 0.65
LR, SCRATCH_LR, L1, GATE_LR_SCALE = 5e-4, 1e-3, 1e-3, 30.0


class Runs:
    """The trainings of one seed, each in a folder of its own."""

    def __init__(self, folder: Path, seed: int, images: int, epochs: int) -> None:
        self.folder, self.seed, self.epochs = folder / f"seed-{seed}", seed, epochs
        self.folder.mkdir(parents=True, exist_ok=True)
        how: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        augmented = create_transform(IMAGE_SIZE, is_training=True, scale=(1, 1), ratio=(1, 1), color_jitter=0, **how)
        self.plain = create_transform(IMAGE_SIZE, is_training=False, crop_pct=1.0, **how)
        self.data = TrainingData(DemoImages(images, split="train"), augmented, len(demo.CLASSES), None)

    def train(self, name: str, model: nn.Module, objective: Objective, epochs: int, lr: float = LR) -> nn.Module:
        """A model trained for so many epochs."""
        click.echo(f"seed {self.seed}: {name}", err=True)
        options = Options(epochs=epochs, batch_size=25, lr=lr, warmup_epochs=0.2, seed=self.seed)
        folder = self.folder / name.replace(" ", "-").replace(",", "")
        return train(model, objective, self.data, options, folder, settings={"name": name}).model

    def models(self) -> dict[str, nn.Module]:
        """All models of the table by name, the dense one first."""
        half = self.epochs // 2
        found: dict[str, nn.Module] = {"dense": demo.load_model()}
        found["dense, trained on"] = self.train("dense", demo.load_model(), CrossEntropy(), self.epochs)
        gated = self.train("gates", demo.load_model(), SparsityObjective(L1, GATE_LR_SCALE), half)
        for rate in RATES:
            smaller = vtp.prune(gated, rate)
            found[f"VTP {rate:.0%}, before fine-tuning"] = copy.deepcopy(smaller)
            found[f"VTP {rate:.0%}"] = self.train(f"vtp {rate}", smaller, CrossEntropy(), self.epochs - half)
        for rate in RATES:
            smaller = by_magnitude(demo.load_model(), rate)
            found[f"magnitude {rate:.0%}"] = self.train(f"magnitude {rate}", smaller, CrossEntropy(), self.epochs)
        for rate in RATES:
            fresh = narrower(parameters(found[f"VTP {rate:.0%}"]), self.seed)
            found[f"narrower, as {rate:.0%}"] = self.train(
                f"scratch {rate}", fresh, CrossEntropy(), self.epochs, SCRATCH_LR
            )
        for method in TOKENS:
            found[f"VTP 40%, {method} at 65 % of its MACs"] = apply(share(found["VTP 40%"]), method, macs=MACS)
        start = demo.load_model()
        learned = DynamicViTObjective(copy.deepcopy(start), KEEP, backbone_lr_scale=0.1)
        found["DynamicViT 0.7"] = self.train("dynamicvit", start, learned, self.epochs, SCRATCH_LR)
        for method in UNTRAINED:
            options: dict[str, Any] = {"layers": (2, 5, 8), "keep": KEEP}
            found[f"{method} 0.7, untrained"] = apply(share(found["dense"]), method, **options)
        return {name: model.eval() for name, model in found.items()}


def by_magnitude(model: nn.Module, rate: float) -> nn.Module:
    """Without the channels of the smallest weights: the norm of a channel's column, over the mean norm of its place."""
    linears = {name: part for name, part in model.named_modules() if name.endswith(vtp.PLACES)}
    norms = {name: part.weight.detach().norm(dim=0) for name, part in linears.items()}
    ranking = Ranking({name: norm / norm.mean() for name, norm in norms.items()})
    return vtp.narrow(model, ranking.kept(ranking.at_rate(rate)))


def narrower(count: int, seed: int) -> nn.Module:
    """An untrained model of the package's shape whose width gives it the nearest number of parameters."""
    dim = min(range(8, 65, 4), key=lambda dim: abs(parameters(vit_demo(embed_dim=dim)) - count))
    torch.manual_seed(seed)
    model = vit_demo(embed_dim=dim)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measured(runs: Runs, held_out: int, batch_size: int, budget: float) -> list[dict[str, Any]]:
    """A record of every model: size, accuracy on images of no training, and time, interleaved."""
    models = runs.models()
    images = DemoImages(held_out, split="val")
    with torch.no_grad():
        accuracy = evaluate(models, batches(images, batch_size=50, transform=runs.plain))
    sample = next(iter(batches(images, batch_size=batch_size, transform=runs.plain)))[0]
    latency = measure_latency(models, sample, budget_s=budget)
    return [
        {
            "model": name,
            "seed": runs.seed,
            "parameters": parameters(model),
            "macs": describe(model).model_macs,
            "images": held_out,
            "top1": accuracy[name].top1,
            "time": 1 / latency[name].speedup,
            "batch": batch_size,
            "rounds": len(latency[name].rounds_s),
        }
        for name, model in models.items()
    ]


def table(records: Iterable[dict[str, Any]]) -> str:
    """Means over the seeds, and the lowest and highest accuracy, as Markdown."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(record["model"], []).append(record)
    mean: Callable[[list[dict[str, Any]], str], float] = lambda rows, key: statistics.fmean(row[key] for row in rows)  # noqa: E731
    lines = ["| | parameters | MACs | top-1 | time of dense |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        accuracy = [row["top1"] for row in found]
        several = "" if min(accuracy) == max(accuracy) else f" ({min(accuracy):.1%} - {max(accuracy):.1%})"
        lines.append(
            f"| {name} | {mean(found, 'parameters') / 1e6:.2f} M | {mean(found, 'macs') / 1e9:.3f} G "
            f"| {statistics.fmean(accuracy):.1%}{several} | {mean(found, 'time'):.2f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the runs.")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="Repeatable; none: the table alone.")
@click.option("--images", type=click.IntRange(25), default=1000, show_default=True, help="Of an epoch.")
@click.option("--epochs", type=click.IntRange(2), default=6, show_default=True, help="Of every model, gates included.")
@click.option("--held-out-images", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="That is timed.")
@click.option("--budget", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds of the timing.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="Append to this JSON-lines file.")
def main(
    output: Path,
    seeds: tuple[int, ...],
    images: int,
    epochs: int,
    held_out_images: int,
    batch_size: int,
    budget: float,
    threads: int,
    record: Path | None,
) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory("cpu")
    for seed in seeds:
        found = measured(Runs(output, seed, images, epochs), held_out_images, batch_size, budget)
        with replacing(output / f"seed-{seed}.json") as file:
            file.write_text(json.dumps(found, indent=1))
        if record:
            append(record, found, environment(torch.device("cpu")))
    files = sorted(output.glob("seed-*.json"))
    if not files:
        raise click.UsageError(f"no seed was measured in {output} yet: give --seed")
    click.echo(f"{len(files)} seeds")
    click.echo(table(each for file in files for each in json.loads(file.read_text())))


if __name__ == "__main__":
    main()
