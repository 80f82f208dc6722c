"""How well a predicted staircase fits a measured one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .edges import MIN_FALL, Edge, find_edges
from .predict import Prediction

TOLERANCE = 2


@dataclass(frozen=True)
class Measured:
    """A measured staircase.

    Attributes:
        tokens: patch tokens that leave the pruning layer, ascending, none twice.
        latency_s: latencies in seconds.
        edges: those that were found against the noise of the measurement; None where nobody looked.
        model: what was measured; None where nobody said.
    """

    tokens: tuple[int, ...]
    latency_s: tuple[float, ...]
    edges: tuple[Edge, ...] | None = None
    model: str | None = None


@dataclass(frozen=True)
class Match:
    """How well predicted edges fit measured ones.

    Attributes:
        predicted: token counts of the predicted edges that the measurement could have seen.
        measured: token counts of the measured edges.
        matched: pairs of a predicted and a measured one, each used once.
        precision: share of the predicted edges that were measured; None when nothing is predicted.
        recall: share of the measured edges that were predicted; None when nothing is measured.
        correlation: of both curves at the measured counts, each without its straight line; None when one has no shape.
        tolerance: how many tokens apart a pair may be.
    """

    predicted: tuple[int, ...]
    measured: tuple[int, ...]
    matched: tuple[tuple[int, int], ...]
    precision: float | None
    recall: float | None
    correlation: float | None
    tolerance: int


def match(
    prediction: Prediction, measured: Measured, *, tolerance: int = TOLERANCE, min_fall: float = MIN_FALL
) -> Match:
    """Compare a prediction with a measurement: the positions of the edges, and the shape of the curves.

    Args:
        prediction: what was predicted.
        measured: what was measured; only counts that the prediction has are compared.
        tolerance: how many tokens apart a predicted and a measured edge may be. Where not every count was measured, a
            measured edge is anywhere between two of them.
        min_fall: how much a measured edge falls at least, as a share of the latency at most tokens. Where the
            measurement has no edges of its own, they are found like the predicted ones.

    Raises:
        ValueError: another model was measured, or fewer than two of the measured counts are in the prediction.
    """
    if measured.model not in (None, prediction.model):
        raise ValueError(f"the measured profile is of {measured.model}, and the prediction of {prediction.model}")
    known = dict(zip(prediction.tokens, prediction.latency_s, strict=True))
    common = [(n, s) for n, s in zip(measured.tokens, measured.latency_s, strict=True) if n in known]
    if len(common) < 2:
        raise ValueError(f"the measured profile has {len(common)} of the predicted token counts; it needs two or more")
    tokens, latency = [n for n, _ in common], [s for _, s in common]
    if measured.edges is None:
        found = find_edges(tokens, latency, min_fall)
    else:
        found = [edge for edge in measured.edges if edge.fall >= min_fall]
    edges = [edge for edge in prediction.edges if tokens[0] <= edge.tokens < tokens[-1]]
    pairs = _pairs(edges, found, tolerance)
    return Match(
        predicted=tuple(edge.tokens for edge in edges),
        measured=tuple(edge.tokens for edge in found),
        matched=pairs,
        precision=len(pairs) / len(edges) if edges else None,
        recall=len(pairs) / len(found) if found else None,
        correlation=_shape_correlation(tokens, latency, [known[n] for n in tokens]),
        tolerance=tolerance,
    )


def read_measured(path: str | Path, batch_size: int = 1) -> Measured:
    """A profile: ``profile.json`` of ``tokenprune profile``, or CSV with a header, or JSON lines.

    The latter two have ``tokens`` and ``latency_s``, and any other fields. Where a count comes several times, the
    median of its latencies is taken.

    Raises:
        ValueError: an unreadable file, no such batch size, a field that is missing, or an impossible value; the message
            names the record.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    content = None
    with contextlib.suppress(ValueError):  # JSON lines and CSV are no JSON
        content = json.loads(text)
    if isinstance(content, dict) and "batches" in content:
        return _of_profile(content, batch_size, path)
    seconds: dict[int, list[float]] = defaultdict(list)
    for number, row in enumerate(_rows(text, path), 1):
        try:
            tokens, latency = int(row["tokens"]), float(row["latency_s"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, record {number}: expected numbers tokens and latency_s, got {row}") from error
        if tokens < 1 or not (math.isfinite(latency) and latency > 0):
            raise ValueError(f"{path}, record {number}: {tokens} tokens in {latency} s cannot be")
        seconds[tokens].append(latency)
    if not seconds:
        raise ValueError(f"{path} has no records")
    counts = tuple(sorted(seconds))
    return Measured(counts, tuple(median(seconds[count]) for count in counts))


def _of_profile(content: dict[str, Any], batch_size: int, path: str | Path) -> Measured:
    """One batch size of a profile, with its steps where more tokens are slower."""
    batches = {batch["batch_size"]: batch for batch in content["batches"]}
    if batch_size not in batches:
        known = ", ".join(str(size) for size in batches)
        raise ValueError(f"{path} has no batch size {batch_size}; it has: {known}")
    series, steps = batches[batch_size]["series"], batches[batch_size]["steps"]
    whole = series["median_s"][-1]
    edges = tuple(Edge(s["below"], s["above"], s["jump_s"] / whole) for s in steps if s["jump_s"] > 0)
    model = content.get("settings", {}).get("model")
    return Measured(tuple(series["tokens"]), tuple(series["median_s"]), edges, model)


def _rows(text: str, path: str | Path) -> Iterable[Mapping[str, Any]]:
    if not text.lstrip().startswith("{"):
        return csv.DictReader(io.StringIO(text))
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is no JSON lines: {error}") from error


def _pairs(predicted: Sequence[Edge], measured: Sequence[Edge], tolerance: int) -> tuple[tuple[int, int], ...]:
    """Nearest first; an edge between two measured counts is at distance 0 from all that lies there."""
    candidates = []
    for one in predicted:
        for other in measured:
            apart = max(0, other.tokens - one.tokens, one.tokens - (other.next - 1))
            candidates.append((apart, one.tokens, other.tokens))
    found: dict[int, int] = {}
    for apart, one_tokens, other_tokens in sorted(candidates):
        if apart <= tolerance and one_tokens not in found and other_tokens not in found.values():
            found[one_tokens] = other_tokens
    return tuple(sorted(found.items()))


def _shape_correlation(tokens: Sequence[int], one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's coefficient of two curves without their straight lines: that both rise says nothing of steps."""
    if len(tokens) < 3:
        return None
    x = np.asarray(tokens, dtype=float)
    rest = []
    for curve in (one, other):
        y = np.asarray(curve, dtype=float)
        left = y - np.polyval(np.polyfit(x, y, 1), x)
        if np.abs(left).max() <= 1e-9 * np.abs(y).max():
            return None
        rest.append(left)
    return float(np.corrcoef(rest[0], rest[1])[0, 1])
