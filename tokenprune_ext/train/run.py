"""A run of training: the model with all that changes beside it, and what happens in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenprune_ext.data import ImageSource
from tokenprune_ext.distributed import Processes
from tokenprune_ext.evaluate import EvaluationError
from tokenprune_ext.sharded import evaluate_sharded

from . import randomness, state
from .data import Plan, TrainingData, Transform, mixer
from .log import Log
from .objective import DrawingObjective, GroupedObjective, Objective
from .options import Options
from .randomness import Draws
from .state import Diverged

_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STATEFUL = ("model", "optimizer", "scheduler", "scaler")


class _Learner(nn.Module):
    """The objective's loss as a forward, which is what DistributedDataParallel looks at."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self.model, images, targets)


class Run:
    """All that changes while training."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: TrainingData,
        options: Options,
        output: Path,
        group: Processes,
        settings: Mapping[str, Any],
        stored: Mapping[str, Any] | None,
    ) -> None:
        self.options, self.data, self.output, self.group, self.settings = options, data, output, group, settings
        self.objective = objective
        torch.manual_seed(options.seed)
        self.model = objective.prepare(model)
        self.optimizer = _optimizer(objective, self.model, options)
        self.step = self.saved = 0 if stored is None else int(stored["step"])
        self.plan = Plan(len(data.images), options, group, self.step)
        self.scheduler = _scheduler(self.optimizer, options, self.plan.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=options.amp == "float16")
        self.mix = mixer(options, data.classes)
        if stored is not None:
            for name in _STATEFUL:
                getattr(self, name).load_state_dict(stored[name])
        self.top1: float | None = None if stored is None else stored["top1"]
        self.random = None if stored is None else stored["random"][group.rank]
        self.learner: nn.Module = _Learner(objective, self.model).train()
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]

    def start(self) -> None:
        """Get together with the other processes."""
        ids = [self.group.device] if self.group.device.type == "cuda" else None
        if self.group.count > 1:
            self.learner = DistributedDataParallel(self.learner, device_ids=ids)
        if self.random is not None:
            randomness.restore(self.random, self.group.device)
        else:  # different from here on, so that processes do not drop the same paths
            randomness.seed(self.options.seed, randomness.PROCESS, self.group.rank)
            torch.cuda.manual_seed(torch.initial_seed())  # does nothing without a GPU

    def advance(self, images: Tensor, labels: Tensor, log: Log | None) -> None:
        """One update of the weights."""
        device, count = self.group.device, self.plan.size(self.step)
        counted = 1 if self.plan.own(self.step) else 0  # a process without images of its own computes one for nothing
        images, targets = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets, self.step)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        places = torch.tensor(self.plan.places(self.step))
        pieces = list(zip(*(each.chunk(self.options.accumulate) for each in (images, targets, places)), strict=True))
        for number, (some, theirs, where) in enumerate(pieces, 1):
            if isinstance(self.objective, DrawingObjective):
                self.objective.draws = Draws((self.options.seed, self.step), where, count)
            weight = counted * len(some) / count
            with nullcontext() if number == len(pieces) else self._without_exchange():
                with self._autocast():
                    loss, parts = self.learner(some, theirs)
                # The gradients of the processes are averaged, but their images are counted together.
                self.scaler.scale(loss * (weight * self.group.count)).backward()
            for name, value in {**parts, "loss": loss}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float() * weight
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip_grad or math.inf)
        means = self.group.total(torch.stack(list(sums.values()))).tolist()
        values = dict(zip(sums, means, strict=True)) | {"grad_norm": float(norm)}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if self.scaler.is_enabled() and bad == ["grad_norm"]:  # the scaler leaves this step out and scales less
            values["grad_norm"] = 0.0
        elif bad:
            raise self._diverged(f"{bad[0]} is {values[bad[0]]}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.scheduler.step_update(self.step)
        if log is not None:
            log.add(values, count)

    def after_step(self, log: Log | None) -> None:
        """Measure, write the log and the checkpoint when it is time."""
        options, epoch_ends = self.options, self.step % self.plan.steps_per_epoch == 0
        top1 = self._accuracy(*self.data.held_out) if epoch_ends and self.data.held_out is not None else None
        self.top1 = self.top1 if top1 is None else top1
        saves = epoch_ends if options.save_every is None else self.step % options.save_every == 0
        saves = saves or self.step == self.plan.steps
        if log is not None and (saves or epoch_ends or self.step % options.log_every == 0):
            epoch = -(-self.step // self.plan.steps_per_epoch)
            log.write(epoch, self.lr, top1, epoch_ends=epoch_ends)  # before the checkpoint: no row is missing
        if saves:
            self._save()

    def _accuracy(self, images: ImageSource, transform: Transform) -> float | None:
        self.model.eval()
        try:
            with torch.random.fork_rng(devices=[]), self._autocast():  # reading images takes random numbers
                found = evaluate_sharded(
                    {"model": self.model},
                    images,
                    transform,
                    self.group,
                    batch_size=max(1, self.options.batch_size // self.group.count),
                    workers=self.options.workers,
                )
        except EvaluationError as error:
            raise self._diverged(str(error)) from error
        self.model.train()
        return found.accuracy["model"].top1

    def _save(self) -> None:
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise self._diverged(f"{name} is not finite")
        random_states = self.group.gather(randomness.states(self.group.device))
        if self.group.leads:
            content = {name: getattr(self, name).state_dict() for name in _STATEFUL}
            state.save(
                self.output, self.settings, {"step": self.step, "top1": self.top1, "random": random_states, **content}
            )
        self.saved = self.step

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.options.amp]
        return torch.autocast(self.group.device.type, dtype, enabled=dtype is not None)

    def _without_exchange(self) -> Any:
        ddp = self.learner
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) else nullcontext()

    def _diverged(self, what: str) -> Diverged:
        good = f"the last good checkpoint is {self.output / state.CHECKPOINT}, step {self.saved}"
        where = f"after step {self.step} of {self.plan.steps}"
        return Diverged(f"{what} {where}; {good if self.saved else 'there is no checkpoint yet'}")


def _optimizer(objective: Objective, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    decay = options.weight_decay
    what = objective.parameter_groups(model, decay) if isinstance(objective, GroupedObjective) else model
    return create_optimizer_v2(what, opt=options.opt, lr=options.lr, weight_decay=decay)


def _scheduler(optimizer: torch.optim.Optimizer, options: Options, steps_per_epoch: int) -> Any:
    warmup: dict[str, Any] = {"warmup_epochs": options.warmup_epochs, "warmup_lr": options.warmup_lr}
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
        **warmup,
    )
    scheduler.step_update(0)
    return scheduler
