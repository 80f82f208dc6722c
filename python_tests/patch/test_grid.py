"""The full grid from the tokens that are left."""

from __future__ import annotations

import re

import pytest
import torch
from host_models import images_for, make_host
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_ext import apply, restore, trace


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 5), st.integers(0, 3))
def test_against_a_loop(data, prefix, left, batch):
    patches = data.draw(st.integers(1, 9))
    row = st.lists(st.integers(-1, left - 1), min_size=patches, max_size=patches)
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    source = torch.tensor(rows, dtype=torch.int64).reshape(batch, patches)
    tokens, grid = torch.randn(batch, prefix + left, 4), torch.randn(batch, patches, 4)
    for fill in (0.0, -2, grid):
        restored = restore(tokens, source, prefix, fill)
        assert restored.shape == grid.shape
        for image in range(batch):
            for patch in range(patches):
                place = int(source[image, patch])
                absent = grid[image, patch] if fill is grid else torch.full((4,), float(fill))
                expected = absent if place < 0 else tokens[image, prefix + place]
                assert torch.equal(restored[image, patch], expected)


def test_gradient_reaches_tokens_and_fill():
    source = torch.tensor([[1, -1, 1, 0], [-1, 2, 0, 1]])
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens, fill: restore(tokens, source, 2, fill), (tokens, fill))
    restore(tokens, source, 2, fill).sum().backward()
    assert tokens.grad[0, :, 0].tolist() == [0, 0, 1, 2, 0]
    assert fill.grad[..., 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_stay_where_they_are(dtype):
    tokens = torch.tensor([[[torch.nan], [1.0], [torch.inf]]], dtype=dtype)
    restored = restore(tokens, torch.tensor([[2, -1, 1, 1]]), 0)
    assert restored.dtype == dtype
    assert restored.flatten().tolist() == [torch.inf, 0, 1, 1]


def test_layer_by_layer_it_gives_the_last_known_values():
    """The example of the docstring, on a model."""
    model = apply(make_host("vit"), "topk", layers=[1, 2], keep=[9, 4])
    images, tokens = images_for(model), {}
    hooks = [
        block.register_forward_hook(lambda *args, i=i: tokens.update({i: args[2]}))
        for i, block in enumerate(model.blocks)
    ]
    found = trace(model, images)
    for hook in hooks:
        hook.remove()
    grid = tokens[0][:, 1:]
    for layer, source in found.sources.items():
        grid = restore(tokens[layer], source, 1, fill=grid)
    for image in range(2):
        for patch in range(16):
            alive = [layer for layer in (1, 2) if found.sources[layer][image, patch] >= 0]
            place = int(found.sources[alive[-1]][image, patch]) if alive else patch
            assert torch.equal(grid[image, patch], tokens[alive[-1] if alive else 0][image, 1 + place])


def test_it_compiles():
    source = torch.tensor([[1, -1, 1, 0]])
    tokens = torch.randn(1, 4, 3)
    compiled = torch.compile(restore, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens, source, 2), restore(tokens, source, 2))


TOKENS, SOURCE = torch.randn(2, 5, 3), torch.zeros(2, 7, dtype=torch.int64)
BAD = {
    "tokens, no tensor": (TypeError, "tokens must be a floating tensor, got list", {"tokens": [1.0]}),
    "tokens, int": (TypeError, "tokens must be a floating tensor, got torch.int64", {"tokens": SOURCE}),
    "tokens, two axes": (
        ValueError,
        r"tokens must be \[B, 2 \+ n, C\] with n > 0, got \[2, 5\]",
        {"tokens": TOKENS[..., 0]},
    ),
    "tokens, prefix alone": (ValueError, r"with n > 0, got \[2, 2, 3\]", {"tokens": TOKENS[:, :2]}),
    "source, floating": (TypeError, "source must be an int64 tensor, got torch.float32", {"source": SOURCE.float()}),
    "source, other batch": (ValueError, r"B = 2 as in tokens, got \[1, 7\]", {"source": SOURCE[:1]}),
    "source, one axis": (ValueError, r"source must be \[B, n0\]", {"source": SOURCE[0]}),
    "source, too large": (ValueError, "positions 3 to 3, and there are 3 patch tokens: is it", {"source": SOURCE + 3}),
    "source, too small": (ValueError, "source has positions -2 to -2", {"source": SOURCE - 2}),
    "prefix, negative": (ValueError, "num_prefix must be at least 0, got -1", {"num_prefix": -1}),
    "prefix, float": (TypeError, "num_prefix must be an int", {"num_prefix": 1.0}),
    "fill, word": (TypeError, "fill must be a number or a grid, got 'last'", {"fill": "last"}),
    "fill, other shape": (
        ValueError,
        r"fill must be a number or a grid \[2, 7, 3\], got \[2, 5, 3\]",
        {"fill": torch.randn(2, 5, 3)},
    ),
    "fill, other dtype": (
        TypeError,
        "dtype of tokens, torch.float32",
        {"fill": torch.zeros(2, 7, 3, dtype=torch.half)},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    kind, message, arguments = BAD[case]
    with pytest.raises(kind, match=message) as caught:
        restore(**{"tokens": TOKENS, "source": SOURCE, "num_prefix": 2, **arguments})
    assert re.match(r"^(tokens|source|num_prefix|fill) ", str(caught.value))
