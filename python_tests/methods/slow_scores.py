"""The scores of the methods as slow, obvious loops over one image, in float64, written from their descriptions.

Tokens are lists of floats and matrices are lists of rows. Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = list[float]
Matrix = list[Row]
HEAD_REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
}


@dataclass
class Image:
    """What a pruning layer sees of one image; queries, keys, values and what is added to the logits for each head."""

    x: Matrix
    q: list[Matrix]
    k: list[Matrix]
    v: list[Matrix]
    scale: float
    prefix: int
    has_class: bool
    size: Row
    bias: list[Matrix]
    counted: bool = False  # whether sizes came in

    @classmethod
    def of(cls, ctx: Any, image: int) -> Image:
        batch, heads, tokens, _ = ctx.q.shape
        bias = [[[0.0] * tokens for _ in range(tokens)] for _ in range(heads)]
        if ctx.bias is not None:
            bias = ctx.bias.double().expand(batch, heads, tokens, tokens)[image].tolist()
        return cls(
            x=ctx.x[image].tolist(),
            q=ctx.q[image].tolist(),
            k=ctx.k[image].tolist(),
            v=ctx.v[image].tolist(),
            scale=ctx.scale,
            prefix=ctx.num_prefix,
            has_class=ctx.has_class_token,
            size=[1.0] * tokens if ctx.size is None else ctx.size[image].tolist(),
            bias=bias,
            counted=ctx.size is not None,
        )

    @property
    def tokens(self) -> range:
        return range(len(self.x))

    @property
    def patches(self) -> range:
        return range(self.prefix, len(self.x))

    @property
    def heads(self) -> range:
        return range(len(self.q))


def dot(a: Row, b: Row) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def cosine(a: Row, b: Row) -> float:
    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / lengths if lengths else 0.0


def softmax(row: Row) -> Row:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def mean_rows(rows: Sequence[Row]) -> Row:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def ranked(scores: dict[int, float]) -> list[int]:
    """Positions from the highest score to the lowest; ties: the lower index."""
    return sorted(scores, key=lambda token: (-scores[token], token))


def attention(image: Image, head: int, tau: float = 1.0) -> Matrix:
    """softmax(q k^T * scale + bias) at a temperature; rows are queries."""
    q, k, bias = image.q[head], image.k[head], image.bias[head]
    logits = [[image.scale * dot(q[i], k[j]) + bias[i][j] for j in image.tokens] for i in image.tokens]
    return [softmax([value / tau for value in row]) for row in logits]


def class_attention(image: Image) -> Row:
    """Mean over the heads of A[cls, j]."""
    return mean_rows([attention(image, head)[0] for head in image.heads])


def mean_received(image: Image) -> Row:
    """Mean over the heads of the attention that all queries give to a token."""
    return mean_rows([[sum(row[j] for row in attention(image, head)) for j in image.tokens] for head in image.heads])


def page_rank(a: Matrix, start: Row, iterations: int, tol: float = 0.0) -> Row:
    """s <- A^T s, until it moves by no more than tol a token."""
    s, tokens = start, range(len(a))
    for _ in range(iterations):
        new = [sum(a[i][j] * s[i] for i in tokens) for j in tokens]
        moved = sum(abs(p - q) for p, q in zip(new, s, strict=True))
        s = new
        if moved <= tol * len(a):
            break
    return s


# Scores of the methods that have one score a token; of the patch tokens alone.


def topk_scores(image: Image) -> dict[int, float]:
    scores = class_attention(image) if image.has_class else mean_received(image)
    return {token: scores[token] for token in image.patches}


def pomt_scores(image: Image, feature: str = "v", head_reduce: str = "max") -> dict[int, float]:
    reduce = HEAD_REDUCE[head_reduce]
    a = [attention(image, head) for head in image.heads]
    received = {k: sum(reduce([a[h][q][k] for h in image.heads]) for q in image.patches) for k in image.patches}
    vectors: list[Matrix] = getattr(image, feature)
    channels = range(len(vectors[0][0]))
    sums = [sum(reduce([vectors[h][k][d] for h in image.heads]) for d in channels) for k in image.tokens]
    weight = softmax(sums)
    return {k: received[k] / max(received.values()) + weight[k] for k in image.patches}


def ats_scores(image: Image) -> dict[int, float]:
    """A[cls, j] * |V_j|, summed over the heads."""
    rows = [attention(image, head)[0] for head in image.heads]
    return {
        j: sum(rows[h][j] * math.sqrt(dot(image.v[h][j], image.v[h][j])) for h in image.heads) for j in image.patches
    }


def peaks_importance(image: Image, source: str, value_length: bool) -> Row:
    """What a token adds to others: per head its attention times the length of its value vector; mean over the heads."""
    if source == "norm":
        return [math.sqrt(dot(row, row)) for row in image.x]
    ones = [1.0] * len(image.x)
    heads = []
    for head in image.heads:
        attn = attention(image, head)
        row = attn[0] if source == "class" else page_rank(attn, ones, 5 if source == "wpr" else 1)
        lengths = [math.sqrt(dot(value, value)) if value_length else 1.0 for value in image.v[head]]
        heads.append([share * length for share, length in zip(row, lengths, strict=True)])
    return mean_rows(heads)


def peaks_scores(image: Image, source: str, exponent: float = 1.0, value_length: bool = True) -> dict[int, float]:
    """importance ** exponent * (1 - near); near: similarity to the most similar more important patch token."""
    importance = peaks_importance(image, source, value_length)
    order = ranked({token: importance[token] for token in image.patches})
    scores = {}
    for place, token in enumerate(order):
        near = max((cosine(image.x[token], image.x[other]) for other in order[:place]), default=-1.0)
        scores[token] = importance[token] ** exponent * (1 - near)
    return scores
