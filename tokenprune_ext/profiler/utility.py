"""How many tokens to remove: the utility of latency and accuracy of arXiv 2407.05941, section 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class Choice:
    """The token count of the highest utility.

    Attributes:
        alpha: weight of the latency, 0..1.
        tokens: patch tokens kept, n*.
        removed: R, how many fewer than the dense model has; 0 when nothing beats dense.
        utility: U(n*).
        latency_s, accuracy: of n*.
        dense_latency_s, dense_accuracy: of the dense model.
    """

    alpha: float
    tokens: int
    removed: int
    utility: float
    latency_s: float
    accuracy: float
    dense_latency_s: float
    dense_accuracy: float

    @property
    def speedup(self) -> float:
        """Dense latency over that of the choice."""
        return self.dense_latency_s / self.latency_s


def utilities(
    latency: Mapping[int, float], accuracy: Mapping[int, float], alpha: float
) -> dict[int, tuple[float, float, float]]:
    """U_L, U_A and U of every token count::

        U_L(n) = 1 - L_n / max L      U_A(n) = A_n / max A      U(n) = alpha U_L(n) + (1 - alpha) U_A(n)

    Args:
        latency: seconds by patch tokens kept, each above 0; the largest count is the dense model.
        accuracy: a measure of the same counts, at least 0, not all 0.
        alpha: weight of the latency, 0..1; 1 looks at latency alone.

    Raises:
        ValueError: a value that is not allowed, or the two have other counts.
    """
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha!r}")
    if not latency or latency.keys() != accuracy.keys():
        raise ValueError(
            f"latency and accuracy must have the same token counts, got {sorted(latency)} and {sorted(accuracy)}"
        )
    for tokens, seconds in latency.items():
        if not 0 < seconds < float("inf"):
            raise ValueError(f"latency must be above 0 and finite, got {seconds} at {tokens} tokens")
    slowest, best = max(latency.values()), max(accuracy.values())
    if not 0 < best < float("inf") or not all(value >= 0 for value in accuracy.values()):
        raise ValueError(f"accuracy must be at least 0, finite and not 0 everywhere, got {dict(accuracy)}")
    result = {}
    for tokens in sorted(latency):
        u_latency, u_accuracy = 1 - latency[tokens] / slowest, accuracy[tokens] / best
        result[tokens] = (u_latency, u_accuracy, alpha * u_latency + (1 - alpha) * u_accuracy)
    return result


def choose(
    latency: Mapping[int, float], accuracy: Mapping[int, float], *, alpha: float = 0.5, margin: float = 0.0
) -> Choice:
    """The token count of the highest utility among dense and those that are faster; ties keep more tokens.

    Args:
        latency, accuracy, alpha: see :func:`utilities`.
        margin: share of the dense latency by which a count must be faster to be a candidate: what noise cannot explain.
            With 1 or more none is.

    Raises:
        ValueError: as :func:`utilities`, or a margin below 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin!r}")
    utility = utilities(latency, accuracy, alpha)
    dense = max(latency)
    faster = [n for n in latency if latency[n] < (1 - margin) * latency[dense]]
    tokens = max((dense, *faster), key=lambda n: (round(utility[n][2], 12), n))  # sums differ in their last bits
    return Choice(
        alpha=alpha,
        tokens=tokens,
        removed=dense - tokens,
        utility=utility[tokens][2],
        latency_s=latency[tokens],
        accuracy=accuracy[tokens],
        dense_latency_s=latency[dense],
        dense_accuracy=accuracy[dense],
    )


def alpha_sweep(
    latency: Mapping[int, float], accuracy: Mapping[int, float], *, margin: float = 0.0
) -> tuple[Choice, ...]:
    """The choice at alpha = 0, 0.1, ..., 1; see :func:`choose`."""
    return tuple(choose(latency, accuracy, alpha=alpha, margin=margin) for alpha in ALPHAS)
