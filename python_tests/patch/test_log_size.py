"""What later blocks add to their logits: the method's log(size), or that of the sizes it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from host_models import images_for, make_host

from tokenprune_ext.methods import ToMe, base, register
from tokenprune_ext.patch import AttentionContext, Reduced
from tokenprune_ext.prune import apply


@dataclass(frozen=True, kw_only=True)
class Changed(ToMe):
    """ToMe that says something else, or nothing, about log(size)."""

    name: ClassVar[str] = "changed_tome"
    told: float | None = None

    def reduce(self, ctx: AttentionContext, keep: int) -> Reduced:
        reduced = super().reduce(ctx, keep)
        log_size = reduced.log_size
        return replace(reduced, log_size=None if self.told is None else torch.full_like(log_size, self.told))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    register(Changed)


def run(method, autocast=False):
    """The output, and the states that the first two blocks hand on."""
    model = make_host("vit")
    apply(model, method, layers=[0, 1], keep=[9, 5])
    states = []
    for block in model.blocks[:2]:
        block.register_forward_hook(lambda *args: states.append(args[2]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(images_for(model)), states


@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_that_of_the_operator_and_else_that_of_the_sizes(autocast):
    output, states = run(ToMe(), autocast)
    fallback, others = run(Changed(), autocast)
    torch.testing.assert_close(output, fallback)
    for state, other in zip(states, others, strict=True):
        assert state.bias.dtype == other.bias.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert state.size.max() > 1
        torch.testing.assert_close(state.bias, state.size.log()[:, None, None].to(state.bias.dtype))
        torch.testing.assert_close(state.bias, other.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_method_says_is_taken(autocast):
    """Zeros for the logarithms are what sizes that do not count give."""
    output, states = run(Changed(told=0.0), autocast)
    expected, none = run(ToMe(proportional=False), autocast)
    assert all(state.bias is not None and not state.bias.any() for state in states)
    assert all(state.bias is None for state in none)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, run(ToMe(), autocast)[0], rtol=1e-3)


def test_it_is_read_where_sizes_count_alone():
    output, states = run(Changed(told=5.0, proportional=False))
    assert all(state.bias is None for state in states)
    assert torch.equal(output, run(ToMe(proportional=False))[0])
