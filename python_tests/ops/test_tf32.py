"""Whether float32 products may use tf32 is torch's setting, which the public functions pass on to their operators."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tokenprune_ext import ops

Q = torch.rand(1, 2, 5, 4, device="meta")  # any device but the CPU, where there is no tf32
CALLS = {
    "attn_colsum_qk": (Q, Q, 0.5),
    "wpr_qk": (Q, Q, 0.5),
    "nearest_token": (Q[:, 0], torch.arange(5, device="meta").unsqueeze(0)),
    "bipartite_match": (Q[:, 0], None, 1),
    "peaks_match": (Q[:, 0], Q[:, 0, :, 0], 1),
    "zero_tprune": (Q, Q, Q, 0.5, 1),
}


@pytest.fixture(params=[False, True])
def allow(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("op", CALLS)
def test_the_setting_is_the_operator_s_last_argument(op: str, allow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"tokenprune_ext.ops.{op}")
    assert getattr(torch.ops.tokenprune, op).default._schema.arguments[-1].name == "allow_tf32"
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "_op", lambda *args: given.append(args))
    getattr(ops, op)(*CALLS[op])
    assert [args[-1] for args in given] == [allow]


@pytest.mark.parametrize("op", ["nearest_token", "bipartite_match"])
def test_distances_are_never_rounded(op: str, allow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"tokenprune_ext.ops.{op}")
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "_op", lambda *args: given.append(args))
    for similarity in ("dot", "euclidean"):
        getattr(ops, op)(*CALLS[op], similarity=similarity)
    assert [args[-1] for args in given] == [allow, False]


def test_every_operator_with_the_setting_is_here() -> None:
    schemas = {name: str(getattr(torch.ops.tokenprune, name).default._schema) for name in ops.__all__}
    assert {name for name, schema in schemas.items() if "allow_tf32" in schema} == set(CALLS)
