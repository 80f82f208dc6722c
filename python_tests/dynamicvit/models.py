"""Small hosts with predictors whose decisions differ from token to token."""

from __future__ import annotations

from functools import partial

import torch
from host_models import make_host
from torch import nn

from tokenprune_ext.dynamicvit import add_predictors, predictors_of

BEFORE = (1, 2, 3)
LAYERS = (0, 1, 2)
KEEP = (12, 9, 5)


def make(host: str = "deit", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A host of 4 blocks and 16 patches in eval mode, with predictors in front of the last three blocks."""
    model = make_host(host, dtype, **options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for stage, predictor in enumerate(predictors_of(add_predictors(model, BEFORE)), 1):
            for parameter in predictor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            predictor.out_conv[4].bias.copy_(torch.tensor([0.4 * stage, 0]))  # else none is left in the end
    return model.eval()


def noise_of(seed):
    """What fills a tensor with exponential noise, call after call."""
    return partial(torch.Tensor.exponential_, generator=torch.Generator().manual_seed(seed))
