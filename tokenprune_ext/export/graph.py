"""A model as one graph of torch operators and ours: what every kind of export starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokenprune_ext.checks import check_int
from tokenprune_ext.patch import adapter_of, inspect_host


def captured(model: nn.Module, images: Tensor | None = None, *, batch: int | None = None) -> ExportedProgram:
    """The model, pruned or dense, through ``torch.export``, without gradients. The model stays as it is.

    Args:
        model: a supported model in eval mode.
        images: an example ``[B, 3, H, W]`` on the model's device and in its dtype; random ones by default. Its height
            and width are those of the graph.
        batch: the batch size of the graph; None for any, from 1 on.

    Raises:
        UnsupportedModelError: the model is not understood.
        TypeError: ``batch`` is no int.
        ValueError: the model is in training mode, ``batch`` is below 1, ``images`` are not ``[B, C, H, W]``.
    """
    adapter = adapter_of(model)
    if model.training:
        raise ValueError("model must be in eval mode to be exported: call model.eval() first")
    if batch is not None:
        check_int("batch", batch, 1)
    if images is None:
        images = example_images(model)
    elif images.dim() != 4 or not len(images):
        raise ValueError(f"images must have shape [B, C, H, W] with B from 1 on, got {list(images.shape)}")
    # torch.export takes a batch of 1 for a constant.
    count = batch or max(2, len(images))
    images = images[torch.arange(count, device=images.device) % len(images)]
    shapes = ({0: Dim("batch", min=1)} if batch is None else None,)
    with adapter.exporting(), torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def example_images(model: nn.Module, batch: int = 2) -> Tensor:
    """Random images ``[batch, C, H, W]`` of the model's input size, on its device and in its dtype."""
    host = inspect_host(model)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((batch, host.in_channels, *host.input_size), generator=generator)
    return images.to(like.device, like.dtype)
