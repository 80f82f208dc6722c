"""What the loop does with an objective: it learns, logs, stops when it diverges, and trains what `prepare` gave."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_training import colours, options, rows, small_vit, stored, toy

from tokenprune_ext.train import CrossEntropy, Diverged, RunError, train


def test_the_loss_falls(tmp_path: Path) -> None:
    found = toy(tmp_path / "run", smoothing=0.0, epochs=30, batch_size=22, lr=5e-3, log_every=10)
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert losses[0] > 0.9
    assert losses[-1] < 0.4
    assert found.top1 == 1.0
    assert not found.model.training


def test_metrics(tmp_path: Path) -> None:
    toy(tmp_path / "run", log_every=3)
    found = rows(tmp_path / "run")
    assert list(found[0]) == ["step", "epoch", "lr", "loss", "cross_entropy", "grad_norm", "top1"]
    assert [(row["step"], row["epoch"], row["top1"] != "") for row in found] == [
        ("3", "1", False),
        ("4", "1", True),  # the end of an epoch
        ("6", "2", False),
        ("8", "2", True),
    ]
    toy(tmp_path / "every", log_every=1)
    single = [float(row["loss"]) for row in rows(tmp_path / "every")]
    assert float(found[0]["loss"]) == pytest.approx(sum(single[:3]) / 3)
    assert float(found[2]["loss"]) == pytest.approx(sum(single[4:6]) / 2)
    rates = [float(row["lr"]) for row in rows(tmp_path / "every")]
    cosine = [0.5e-3 * (1 + math.cos(math.pi * step / 8)) for step in range(2, 8)]
    assert rates == pytest.approx([1e-5, 1e-5 + 0.5 * (1e-3 - 1e-5), *cosine])  # half an epoch, two steps, of warm-up


def test_gradients_are_clipped(tmp_path: Path) -> None:
    def moved(clip_grad: float | None) -> float:
        folder = tmp_path / str(clip_grad)
        trained = toy(folder, epochs=1, batch_size=22, warmup_epochs=0, opt="sgd", weight_decay=0, clip_grad=clip_grad)
        pairs = zip(trained.model.parameters(), small_vit().parameters(), strict=True)
        return sum(float((one - other).detach().square().sum()) for one, other in pairs) ** 0.5

    free = moved(None)
    norm = float(rows(tmp_path / "None")[0]["grad_norm"])
    assert moved(norm / 4) == pytest.approx(free / 4, rel=1e-3)
    # What is logged is the norm before.
    assert float(rows(tmp_path / str(norm / 4))[0]["grad_norm"]) == pytest.approx(norm, rel=1e-3)


def test_without_held_out_images(tmp_path: Path) -> None:
    assert toy(tmp_path / "run", held_out=0).top1 is None
    assert {row["top1"] for row in rows(tmp_path / "run")} == {""}


def test_validation_changes_nothing(tmp_path: Path) -> None:
    toy(tmp_path / "with", drop=0.2)
    toy(tmp_path / "without", drop=0.2, held_out=0)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Seen(CrossEntropy):
    """Notes what the model computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def prepare(self, model: nn.Module) -> nn.Module:
        model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: self.dtypes.add(call[2].dtype))
        return super().prepare(model)


@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_autocast(tmp_path: Path, amp: str) -> None:
    objective = Seen()
    how = options(amp=amp, epochs=30, batch_size=22, lr=5e-3)
    found = train(small_vit(), objective, colours(), how, tmp_path / "run")
    assert objective.dtypes == {torch.float32 if amp == "none" else getattr(torch, amp)}
    assert {value.dtype for value in found.model.parameters()} == {torch.float32}
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.4 < losses[0]
    assert bool(stored(tmp_path / "run")["scaler"]) == (amp == "float16")


class Broken(CrossEntropy):
    """Gives something that is not finite from a step on."""

    def __init__(self, step: int, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.spoil = step, spoil

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.step -= 1
        loss, parts = super().loss(model, images, targets)
        return (self.spoil(loss) if self.step < 0 else loss), parts


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "loss is nan": lambda loss: loss * math.nan,
    "loss is inf": lambda loss: loss + math.inf,
    "grad_norm is": lambda loss: loss + (loss - loss.detach()).sqrt(),  # of zero: an infinite slope,
}


@pytest.mark.parametrize("what", SPOILT)
def test_divergence(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=rf"^{what}.* after step 6 of 8; .*{folder}/checkpoint.pt, step 4$"):
        train(small_vit(), Broken(6, SPOILT[what]), colours(), options(), folder)
    good = stored(folder)
    assert good["step"] == 4
    assert all(value.isfinite().all() for value in good["model"].values())
    assert not (folder / "model.safetensors").exists()


def test_divergence_before_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="loss is nan after step 0 of 8; there is no checkpoint yet"):
        train(small_vit(), Broken(0, SPOILT["loss is nan"]), colours(), options(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    class Overflow(CrossEntropy):
        def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = super().loss(model, images, targets)
            model.norm.bias.data[0] = math.inf  # only the next step would show it
            return found

    with pytest.raises(Diverged, match=r"norm\.bias is not finite after step 1 of 8"):
        train(small_vit(), Overflow(), colours(held_out=0), options(save_every=1), tmp_path / "run")


class Gated(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.gates = model, nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * self.gates


class Gates(CrossEntropy):
    """Trains gates alone, with a penalty, and gives the model back without them."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return Gated(model.requires_grad_(False))

    def loss(self, model: Any, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().loss(model, images, targets)
        penalty = model.gates.abs().sum()
        return loss + penalty, {**parts, "penalty": penalty}

    def parameter_groups(self, model: Any, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [model.gates], "weight_decay": 0.0, "lr_scale": 0.5}]

    def finish(self, model: Any) -> nn.Module:
        return model.model


def test_an_objective_of_its_own(tmp_path: Path) -> None:
    model = small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = train(model, Gates(), colours(), options(accumulate=2, log_every=1, opt="sgd"), tmp_path / "run")
    assert found.model is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == before.keys()
    saved, first = stored(tmp_path / "run"), rows(tmp_path / "run")[0]
    assert (saved["model"]["gates"] < 1).all()
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0
    assert float(first["loss"]) == pytest.approx(float(first["cross_entropy"]) + float(first["penalty"]))
    assert float(first["penalty"]) == pytest.approx(3)  # once, whatever the parts
    assert float(first["lr"]) == pytest.approx(0.5e-5)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_vit(), CrossEntropy(), colours(), options(), tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows(tmp_path / "run")})
    assert [event.step for event in events.Scalars("top1")] == [4, 8]


def test_tensorboard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"pip install 'tokenprune\[train\]'"):
        train(small_vit(), CrossEntropy(), colours(), options(), tmp_path / "run", tensorboard=True)
    assert not list(tmp_path.iterdir())
