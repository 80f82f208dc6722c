"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

AMP = ("none", "bfloat16", "float16")
SCHEDULERS = ("cosine", "poly", "step", "tanh")
_WITHOUT_EFFECT = ("workers", "log_every", "save_every")  # on the weights


@dataclass(frozen=True)
class Options:
    """How a model is trained.

    Attributes:
        epochs: passes over the images.
        batch_size: images of a step, over all processes; the last step of an epoch may have fewer.
        accumulate: parts in which a process computes its share of a step, one after the other.
        opt: timm's name of the optimiser.
        lr, weight_decay: of the optimiser.
        sched: timm's name of the schedule of the learning rate.
        min_lr: where the schedule ends.
        warmup_epochs, warmup_lr: the learning rate first rises from `warmup_lr`; part of `epochs`.
        clip_grad: largest norm of all gradients, None for any.
        amp: dtype of autocast, or "none".
        mixup, cutmix: strength of timm's mixing of images, 0 for none.
        seed: of the order of images, augmentation, new layers and everything random in the model.
        workers: further processes, of each process, that read images.
        log_every: steps of a row of the log.
        save_every: steps between checkpoints; None for one after every epoch. There is one at the end in any case.
    """

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    opt: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    clip_grad: float | None = 1.0
    amp: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("lr", "clip_grad"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs:g}")
        for name, allowed in (("amp", AMP), ("sched", SCHEDULERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        _check_optimizer(self.opt)

    def settings(self) -> dict[str, Any]:
        """Those that the trained weights depend on."""
        return {name: value for name, value in asdict(self).items() if name not in _WITHOUT_EFFECT}


_LOWEST = (
    dict.fromkeys(("epochs", "batch_size", "accumulate", "log_every", "save_every"), 1)
    | dict.fromkeys(("lr", "weight_decay", "min_lr", "warmup_epochs", "warmup_lr", "clip_grad"), 0)
    | dict.fromkeys(("mixup", "cutmix", "seed", "workers"), 0)
)


def _check_optimizer(name: str) -> None:
    import difflib

    from timm.optim import list_optimizers  # type: ignore[attr-defined]

    known = list_optimizers()
    if name.lower() not in known:
        near = difflib.get_close_matches(name, [str(one) for one in known], n=3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"timm has no optimiser {name!r}; there are {', '.join(near)} and more")
