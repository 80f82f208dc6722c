"""Where nothing can have a gradient, torch's Python for it is left out, and nothing else changes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune_ext import ops


def operators(bench: Path) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What calls each operator with its arguments in order, and such arguments."""
    calls = importlib.import_module("operator_calls").operator_calls("cpu")
    return {op: (importlib.import_module(f"tokenprune_ext.ops.{op}")._op, args) for op, args in calls.items()}


def all_calls(bench: Path) -> dict[str, Callable[[], Any]]:
    """A call of every operator, on tensors that want a gradient where they can have one."""
    calls = {}
    for op, (operator, args) in operators(bench).items():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                arg.requires_grad_()
        calls[op] = partial(operator, *args)
    return calls


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def asks_for_gradient(call: Callable[[], Any]) -> bool:
    """Whether torch's Python function that decides about a gradient runs."""
    seen = set()
    sys.setprofile(lambda frame, event, arg: seen.add(frame.f_code.co_name))
    try:
        call()
    finally:
        sys.setprofile(None)
    return "autograd_impl" in seen


def test_same_results_with_less_python(bench: Path) -> None:
    for op, call in all_calls(bench).items():
        expected = tensors(call())
        assert asks_for_gradient(call), op
        with torch.no_grad():
            found = tensors(call())
            assert not asks_for_gradient(call), op
        with torch.inference_mode():
            assert not asks_for_gradient(call), op
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), op
            assert not other.requires_grad, op


def test_shapes_of_fake_tensors(bench: Path) -> None:
    with FakeTensorMode() as mode, torch.no_grad():
        shapes = {}
        for op, (operator, args) in operators(bench).items():
            fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            shapes[op] = [t.shape for t in tensors(operator(*fakes))]
    with torch.no_grad():
        for op, call in all_calls(bench).items():
            assert shapes[op] == [t.shape for t in tensors(call())], op


def test_gradients_inside_of_no_grad() -> None:
    """Of a part of the computation that asks for them again, and of what was computed before."""
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 9, dtype=torch.float64)

    def energy() -> torch.Tensor:
        return ops.topk_gather(x, scores, 3, 1, "mean")[0].square().sum()

    (expected,) = torch.autograd.grad(energy(), x)
    with torch.no_grad():
        assert not energy().requires_grad
        with torch.enable_grad():
            again = energy()
        (found,) = torch.autograd.grad(again, x)
    assert expected.abs().sum() > 0
    assert torch.equal(expected, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refusals_are_the_same(mode: Any) -> None:
    with mode(), pytest.raises(ValueError, match=r"keep must be at most 8 .*, got 9"):
        ops.topk_gather(torch.randn(2, 9, 4), torch.rand(2, 9), 9, 1)
