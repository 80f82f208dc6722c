"""The accuracy proxy against the models it stands for, and the state of the clocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_models import make_host
from torch import Tensor

import tokenprune_ext as tokenprune
from tokenprune_ext.profiler import measure_accuracy
from tokenprune_ext.profiler.accuracy import data_facts
from tokenprune_ext.profiler.clocks import _cpu_state, clock_state
from tokenprune_ext.profiler.journal import Records

COUNTS = range(1, 17)  # more than are evaluated at once


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def predictions(images: Tensor, tokens: int, seed: int) -> Tensor:
    model = make_host("vit")
    if tokens < 16:
        tokenprune.apply(model, tokenprune.methods.Random(seed=seed), layers=(0,), keep=[tokens])
    with torch.inference_mode():
        return model(images).argmax(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_tokens_leave_at_the_first_layer(images: Tensor, seed: int) -> None:
    labels = torch.arange(24) % 10
    records, done = Records(), []
    batches = [(images[:10], labels[:10]), (images[10:], labels[10:])]
    found = measure_accuracy(make_host("vit"), batches, COUNTS, records, seed=seed, on_count=done.append)
    expected = {n: float((predictions(images, n, seed) == labels).double().mean()) for n in COUNTS}
    assert found == pytest.approx(expected)
    assert done == [8, 16]
    assert records.accuracy[4]["measure"] == "top-1"
    assert records.accuracy[16]["se"] == 0.0
    assert len(set(found.values())) > 1


def test_without_labels_it_is_agreement_with_dense(images: Tensor) -> None:
    records = Records()
    found = measure_accuracy(make_host("vit"), [(images, torch.full((24,), -1))], (4, 16), records)
    agree = float((predictions(images, 4, 0) == predictions(images, 16, 0)).double().mean())
    assert found == pytest.approx({4: agree, 16: 1.0})
    assert records.accuracy[4]["measure"] == "agreement with dense"
    assert records.accuracy[4]["se"] == pytest.approx((agree * (1 - agree) / 24) ** 0.5)


def test_what_is_recorded_is_not_evaluated_again(images: Tensor) -> None:
    records = Records()
    records.add_accuracy(4, {"measure": "top-1", "value": 0.123, "se": 0.0})
    found = measure_accuracy(make_host("vit"), [(images, torch.zeros(24, dtype=torch.int64))], (4, 16), records)
    assert found[4] == 0.123
    assert found[16] != 0.123


def test_images_labels_and_weights_are_told_apart(images: Tensor) -> None:
    labels, model = torch.zeros(24, dtype=torch.int64), make_host("vit")
    facts = data_facts(model, [(images, labels)], 0)
    assert facts == data_facts(model, [(images, labels)], 0)
    assert (facts["images"], facts["labelled"], facts["seed"]) == (24, True, 0)
    assert data_facts(model, [(images, labels + 1)], 0)["content"] != facts["content"]
    assert data_facts(model, [(images + 1, labels)], 0)["content"] != facts["content"]
    with torch.no_grad():
        model.norm.bias += 1
    assert data_facts(model, [(images, labels)], 0)["weights"] != facts["weights"]
    assert not data_facts(model, [(images, labels - 1)], 0)["labelled"]


def test_clocks_that_can_be_read(tmp_path: Path) -> None:
    assert _cpu_state(tmp_path) == {}
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_governor").write_text("performance\n")
    assert _cpu_state(tmp_path) == {"governor": "performance"}
    assert isinstance(clock_state(torch.device("cpu")), dict)
