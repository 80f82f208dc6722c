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
SETTINGS = {
    "allow_tf32": {False: False, True: True},
    "fp32_precision": {"none": False, "ieee": False, "tf32": True},
}


@pytest.fixture(params=[(name, value) for name, values in SETTINGS.items() for value in values], ids=str)
def allow(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether tf32 is allowed, by the old setting of torch and by the new one, which makes the old one unreadable."""
    name, value = request.param
    setattr(torch.backends.cuda.matmul, name, value)
    yield SETTINGS[name][value]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "none"


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


def test_compiled_calls_follow_the_setting(allow: bool) -> None:
    """They are compiled again when it changes."""
    given: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        (call,) = (node for node in graph.graph.nodes if node.target is torch.ops.tokenprune.wpr_qk.default)
        given.append(call.args[-1])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda q: ops.wpr_qk(q, q, 0.5), fullgraph=True, backend=backend)
    compiled(Q)
    torch.backends.cuda.matmul.fp32_precision = "ieee" if allow else "tf32"
    compiled(Q)
    assert given == [allow, not allow]
