"""The choice of R against its definition, and on published figures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_ext.profiler import alpha_sweep, choose, utilities

LATENCY = {4: 2.0, 8: 4.0, 16: 5.0}
ACCURACY = {4: 0.3, 8: 0.6, 16: 0.8}


def test_utilities_are_those_of_the_paper() -> None:
    found = utilities(LATENCY, ACCURACY, 0.5)
    assert found[16] == pytest.approx((0.0, 1.0, 0.5))
    assert found[8] == pytest.approx((1 - 4 / 5, 0.6 / 0.8, 0.5 * 0.2 + 0.5 * 0.75))
    assert found[4] == pytest.approx((0.6, 0.375, 0.4875))


def test_choice_and_its_figures() -> None:
    choice = choose(LATENCY, ACCURACY, alpha=0.6)
    assert (choice.tokens, choice.removed) == (4, 12)
    assert choice.utility == pytest.approx(0.6 * 0.6 + 0.4 * 0.375)
    assert (choice.latency_s, choice.dense_latency_s, choice.speedup) == (2.0, 5.0, 2.5)
    assert (choice.accuracy, choice.dense_accuracy) == (0.3, 0.8)
    assert choose(LATENCY, ACCURACY).removed == 0


def test_the_slowest_need_not_be_dense() -> None:
    found = utilities({4: 6.0, 8: 3.0, 16: 4.0}, ACCURACY, 1.0)
    assert found[4][2] == 0.0
    assert found[16][2] == pytest.approx(1 / 3)


def test_ties_keep_more_tokens() -> None:
    latency = {4: 1.0, 5: 1.0, 6: 1.0, 7: 2.0}
    assert choose(latency, dict.fromkeys(latency, 0.7)).tokens == 6
    assert choose(latency, dict.fromkeys(latency, 0.7), alpha=0).tokens == 7
    third = {3: 0.3, 4: 0.1 + 0.2, 5: 0.9}  # equal but for the last bit
    assert choose(third, dict.fromkeys(third, 1.0)).tokens == 4


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_nothing_that_is_not_faster_than_dense_is_chosen(alpha: float) -> None:
    choice = choose({4: 5.0, 8: 6.0, 16: 5.0}, {4: 0.9, 8: 0.9, 16: 0.8}, alpha=alpha)
    assert (choice.removed, choice.tokens) == (0, 16)


def test_what_noise_explains_is_not_faster() -> None:
    latency, accuracy = {8: 4.9, 16: 5.0}, {8: 0.8, 16: 0.8}
    assert choose(latency, accuracy).removed == 8
    assert choose(latency, accuracy, margin=0.05).removed == 0


curves = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.01, 1)), min_size=1, max_size=30)


def test_noise_as_large_as_the_latency_leaves_nothing_to_choose() -> None:
    assert choose({4: 0.1, 16: 1.0}, {4: 1.0, 16: 1.0}, alpha=1.0, margin=1.3).removed == 0


@given(curves)
@settings(deadline=None)
def test_more_weight_of_latency_never_chooses_slower(curve: list[tuple[float, float]]) -> None:
    latency = {n: seconds for n, (seconds, _) in enumerate(curve, start=1)}
    accuracy = {n: value for n, (_, value) in enumerate(curve, start=1)}
    sweep = alpha_sweep(latency, accuracy)
    assert [choice.alpha for choice in sweep] == [i / 10 for i in range(11)]
    assert all(later.latency_s <= earlier.latency_s + 1e-9 for earlier, later in pairwise(sweep))
    assert sweep[-1].latency_s == pytest.approx(min(latency.values()))
    assert all(choice.latency_s <= choice.dense_latency_s for choice in sweep)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 1.5}, "alpha must be in 0..1, got 1.5"),
        ({"alpha": float("nan")}, "alpha must be in 0..1"),
        ({"alpha": True}, "alpha must be in 0..1, got True"),
        ({"latency": {}}, "the same token counts, got \\[\\]"),
        ({"latency": {4: 1.0}}, "the same token counts, got \\[4\\] and \\[4, 8, 16\\]"),
        ({"latency": {4: 1.0, 8: 0.0, 16: 2.0}}, "latency must be above 0 and finite, got 0.0 at 8 tokens"),
        ({"latency": {4: 1.0, 8: float("nan"), 16: 2.0}}, "latency must be above 0 and finite, got nan"),
        ({"accuracy": dict.fromkeys(ACCURACY, 0.0)}, "accuracy must be at least 0, finite and not 0 everywhere"),
        ({"accuracy": {**ACCURACY, 8: -0.1}}, "accuracy must be at least 0"),
        ({"margin": -0.1}, "margin must be at least 0, got -0.1"),
        ({"margin": float("nan")}, "margin must be at least 0, got nan"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], said: str) -> None:
    given = {"latency": LATENCY, "accuracy": ACCURACY, **change}
    with pytest.raises(ValueError, match=said):
        choose(given.pop("latency"), given.pop("accuracy"), **given)  # type: ignore[arg-type]


def test_the_published_r_is_chosen_at_the_published_alpha(bench: Path) -> None:
    import paper_utility

    chosen_from = {name: paper_utility.first_alpha(name) for name in paper_utility.PUBLISHED}
    assert all(0 < alpha < 0.5 for alpha in chosen_from.values())
    # by far the largest loss of accuracy needs the most weight on latency
    assert max(chosen_from, key=chosen_from.__getitem__) == "A100 b16 DINOv2-G"
    for name, (dense_ms, pruned_ms, patches, removed, dense, change) in paper_utility.PUBLISHED.items():
        sweep = alpha_sweep(
            {patches: dense_ms, patches - removed: pruned_ms}, {patches: dense, patches - removed: dense + change}
        )
        assert [choice.removed for choice in sweep] == [removed * (i / 10 >= chosen_from[name]) for i in range(11)]


def test_where_a_method_is_slower_than_dense_nothing_is_removed() -> None:
    # the same source, TX2 b1, DeiT-S: Top-K and ToMe at the same R = 69
    for ms in (43.38, 50.70):
        assert choose({196: 35.32, 127: ms}, {196: 79.8, 127: 78.8}, alpha=1.0).removed == 0
