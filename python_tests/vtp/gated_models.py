"""Models with gates that look trained: uneven, of both signs, some of them 0 and some equal."""

from __future__ import annotations

import torch
from host_models import HOSTS, images_for, make_host
from torch import nn

from tokenprune_ext import vtp

# Of the hosts' families, those whose channels do not depend on each other.
VTP_HOSTS = [name for name in HOSTS if name not in ("dinov2_swiglu", "scale_norm", "gated")]


def train_gates(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the gates of a model values as training could leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in vtp.gates_of(model).values():
            gate.copy_(torch.randn(gate.shape, generator=generator).mul(4).round().div(4) + 0.125)
    return model


def gated_host(name: str = "deit", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return train_gates(vtp.add_gates(make_host(name, dtype, **options)))


def zero_pruned(model: nn.Module, smaller: nn.Module) -> nn.Module:
    """Set the gates to 0 that a smaller copy lacks: of every place the least, by definition."""
    widths = [width for block in vtp.widths_of(smaller) for width in block]
    with torch.no_grad():
        for gate, width in zip(vtp.gates_of(model).values(), widths, strict=True):
            order = sorted(range(len(gate)), key=lambda i, gate=gate: (-abs(float(gate[i])), i))
            gate[order[width:]] = 0
    return model


__all__ = ["VTP_HOSTS", "gated_host", "images_for", "train_gates", "zero_pruned"]
