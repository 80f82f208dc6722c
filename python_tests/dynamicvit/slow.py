"""DynamicViT in plain loops over one image, written from the paper (sections 3.2 and 3.3), in float64."""

from __future__ import annotations

import math

from torch import Tensor, nn

Vector = list[float]


def linear(x: Vector, layer: nn.Linear) -> Vector:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def gelu(x: Vector) -> Vector:
    return [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]


def layer_norm(x: Vector, layer: nn.LayerNorm) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [
        (v - mean) / math.sqrt(variance + layer.eps) * w + b
        for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def predict(predictor: nn.Module, tokens: list[Vector], there: list[bool]) -> list[tuple[float, float]]:
    """Log-probabilities of keeping and of dropping, of every token."""
    features = [gelu(linear(layer_norm(x, predictor.in_conv[0]), predictor.in_conv[1])) for x in tokens]
    half = len(features[0]) // 2
    present = [z for z, here in zip(features, there, strict=True) if here]
    whole = [sum(z[c] for z in present) / len(present) for c in range(half, 2 * half)]
    result = []
    for z in features:
        out = z[:half] + whole
        for index in (0, 2):
            out = gelu(linear(out, predictor.out_conv[index]))
        keep, drop = linear(out, predictor.out_conv[4])
        total = math.log(math.exp(keep) + math.exp(drop))
        result.append((keep - total, drop - total))
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, there: list[bool]) -> list[Vector]:
    """Output of one head: every token attends to those that are there and to itself."""
    result = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if there[j] or j == i]
        weights = [math.exp(scale * float(q[i] @ k[j])) for j in seen]
        total = sum(weights)
        mixed = sum(weight * v[j] for weight, j in zip(weights, seen, strict=True)) / total
        result.append(mixed.tolist())
    return result
