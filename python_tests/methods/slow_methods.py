"""The pruning methods as slow, obvious loops over one image, in float64, written from their descriptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from methods.slow_scores import Image, Matrix, Row, ats_scores, attention, cosine, dot, mean_rows, page_rank, ranked


@dataclass
class Pruned:
    """Tokens that leave, positions of the kept ones, how many patches each stands for, who went into whom."""

    x: Matrix
    kept: list[int]
    size: Row | None = None
    into: dict[int, int] | None = None
    fused: bool = False


def reduce_tokens(image: Image, scores: dict[int, float], keep: int, reduction: str) -> Pruned:
    order = ranked(scores)
    fuses = reduction in ("mean", "weighted", "sum")
    kept = sorted(order[: keep - 1] if fuses else order[:keep])
    lost = sorted(set(scores) - set(kept))
    if reduction == "merge":
        return merge(image, kept, {token: nearest(image, token, kept) for token in lost})
    rows = [image.x[token] for token in (*range(image.prefix), *kept)]
    if not fuses:
        return Pruned(rows, kept)
    weights = {token: 1 / len(lost) if reduction == "mean" else scores[token] for token in lost}
    if reduction == "weighted":
        total = math.fsum(weights.values())
        weights = {token: weight / total for token, weight in weights.items()}
    fused = [sum(weights[token] * image.x[token][c] for token in lost) for c in range(len(image.x[0]))]
    return Pruned([*rows, fused], kept, fused=True)


def nearest(image: Image, token: int, among: Iterable[int]) -> int:
    """The most similar token by cosine; ties: the lower index."""
    return ranked({other: cosine(image.x[token], image.x[other]) for other in among})[0]


def merge(image: Image, kept: list[int], into: dict[int, int]) -> Pruned:
    """Size-weighted means; sizes add."""
    rows, sizes = [], []
    for token in (*range(image.prefix), *kept):
        members = [token, *sorted(source for source, target in into.items() if target == token)]
        size = sum(image.size[member] for member in members)
        channels = range(len(image.x[0]))
        mean = [sum(image.size[member] * image.x[member][c] for member in members) / size for c in channels]
        rows.append(mean if len(members) > 1 else image.x[token])
        sizes.append(size)
    return Pruned(rows, kept, sizes, into)


def match_pairs(
    feature: Matrix, group_a: list[int], group_b: list[int], r: int, metric: str = "cosine"
) -> dict[int, int]:
    """The r tokens of A that are most like one of B, with their partners."""
    like = {"cosine": cosine, "dot": dot, "euclidean": lambda a, b: -math.dist(a, b)}[metric]
    partner = {a: ranked({b: like(feature[a], feature[b]) for b in group_b})[0] for a in group_a}
    best = ranked({a: like(feature[a], feature[b]) for a, b in partner.items()})[:r]
    return {a: partner[a] for a in best}


def tome(image: Image, keep: int, merges: bool = True) -> Pruned:
    patches = list(image.patches)
    metric = [mean_rows([image.k[head][token] for head in image.heads]) for token in image.tokens]
    pairs = match_pairs(metric, patches[0::2], patches[1::2], len(patches) - keep)
    kept = [token for token in patches if token not in pairs]
    if merges:
        return merge(image, kept, pairs)
    return Pruned([image.x[token] for token in (*range(image.prefix), *kept)], kept)


def ats(image: Image, quantiles: int) -> Pruned:
    """Inverse transform sampling at fixed quantiles; repeats are removed, and padding of size 0 fills the places."""
    scores = ats_scores(image)
    total = sum(scores.values())
    sampled: set[int] = set()
    for k in range(quantiles):
        level, below = (k + 0.5) / quantiles, 0.0
        for token in image.patches:
            below += scores[token] / total
            if below >= level:
                sampled.add(token)
                break
    padding = [token for token in image.patches if token not in sampled][: quantiles - len(sampled)]
    kept = sorted([*sampled, *padding])
    sizes = [1.0] * image.prefix + [float(token in sampled) for token in kept]
    return Pruned([image.x[token] for token in (*range(image.prefix), *kept)], kept, sizes)


def combined_rank(ranks: list[Row], patches: Sequence[int], vmin: float, vmax: float) -> dict[int, float]:
    """Variance-based head filter over the patch tokens, then the root mean square over the heads left."""
    passing = []
    for s in ranks:
        mean = sum(s[token] for token in patches) / len(patches)
        if vmin <= sum((s[token] - mean) ** 2 for token in patches) / len(patches) <= vmax:
            passing.append(s)
    passing = passing or ranks
    return {token: math.sqrt(sum(s[token] ** 2 for s in passing) / len(passing)) for token in patches}


def importance(
    image: Image,
    alive: list[int],
    iterations: int,
    *,
    start: str = "class",
    tol: float = 0.0,
    tau: float = 1.0,
    vmin: float = 0.01,
    vmax: float = 0.7,
) -> dict[int, float]:
    """Page rank on the attention among prefix tokens and the patch tokens alive, with rows that sum to 1 again."""
    nodes = [*range(image.prefix), *alive]
    first = [1.0] * len(nodes)
    if start == "class":
        first[0] = math.sqrt(len(nodes))
    ranks = []
    for head in image.heads:
        a = attention(image, head, tau)
        among = [[a[i][j] for j in nodes] for i in nodes]
        among = [[value / sum(row) for value in row] for row in among]
        ranks.append(page_rank(among, first, iterations, tol))
    places = range(image.prefix, len(nodes))
    return {nodes[place]: value for place, value in combined_rank(ranks, places, vmin, vmax).items()}


def compared(image: Image, feature: str) -> Matrix:
    """What the similarity stage compares, one vector a token."""
    if feature == "hidden":
        return image.x
    if feature == "key_heads":
        return [[value for head in image.heads for value in image.k[head][token]] for token in image.tokens]
    vectors: list[Matrix] = {"key": image.k, "query": image.q, "value": image.v}[feature]
    return [mean_rows([vectors[head][token] for head in image.heads]) for token in image.tokens]


def zero_tprune(
    image: Image,
    keep: int,
    iterations: int,
    *,
    similar: int | None = None,
    partition: str = "unimportant",
    feature: str = "key",
    metric: str = "cosine",
    merges: bool = False,
    random: dict[int, float] | None = None,
    **ranking: Any,
) -> Pruned:
    """I' -> S -> I. ``random``: the scores that draw the halves of the random partition."""
    patches = list(image.patches)
    r = min(10 if similar is None else similar, len(patches) - keep, len(patches) // 2)
    pairs: dict[int, int] = {}
    if r:
        if partition == "alternate":
            group_a, group_b = patches[0::2], patches[1::2]
        else:
            order = ranked(random if partition == "random" else importance(image, patches, 1, **ranking))
            half = len(patches) // 2 if partition != "important" else len(patches) - len(patches) // 2
            better, worse = sorted(order[:half]), sorted(order[half:])
            group_a, group_b = (better, worse) if partition == "important" else (worse, better)
        pairs = match_pairs(compared(image, feature), group_a, group_b, r, metric)
    alive = [token for token in patches if token not in pairs]
    kept = sorted(ranked(importance(image, alive, iterations, **ranking))[:keep])
    if not merges:
        return Pruned([image.x[token] for token in (*range(image.prefix), *kept)], kept)
    lost = {token: nearest(image, token, kept) for token in alive if token not in kept}
    pairs = {token: lost.get(partner, partner) for token, partner in pairs.items()}  # a lost partner takes it along
    return merge(image, kept, {**lost, **pairs})
