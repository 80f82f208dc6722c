"""What a latency profile depends on, checked before anything is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tokenprune_ext import methods
from tokenprune_ext.checks import check_bool, check_choice, check_int
from tokenprune_ext.environment import environment
from tokenprune_ext.methods import Method, Random
from tokenprune_ext.patch import Host, inspect_host
from tokenprune_ext.schedule import default_layers

from .points import stride_grid

MODES = ("deployed", "paper")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured, and how; a profile is resumed only with equal settings.

    Attributes:
        model: architecture name.
        input_size: height and width of the images, in pixels.
        num_prefix_tokens, num_patches, channels: see ``Host``.
        mode: what is measured. ``deployed``: the model pruned by ``method``, choosing tokens included. ``paper``:
            random token removal at the first layer, the same for every image, as in arXiv 2407.05941, section 3.
        method, options: registered name of the method that a schedule is made for, and its options.
        layer: 0-based block where it prunes.
        dtype: of weights and images, e.g. ``bfloat16``.
        batch_sizes: images of a forward pass.
        cuda_graph: whether calls are replayed as CUDA graphs.
        min_tokens: fewest patch tokens that are measured.
        stride: distance of the token counts that are measured.
        coarse: distance of the first grid, which is refined to ``stride`` around steps; None for all counts at once.
        rounds: how often each point is visited; noisy points are visited up to twice as often.
        visit_s: seconds of timed calls of a visit; at least three calls are made.
        noise_target: relative standard error of a point's latency above which it is visited again.
        blocks: whether single blocks are measured too.
        seed: of the order of the visits and of the images' pixels.
    """

    model: str
    input_size: tuple[int, int]
    num_prefix_tokens: int
    num_patches: int
    channels: int
    mode: str
    method: str
    options: dict[str, Any]
    layer: int
    dtype: str
    batch_sizes: tuple[int, ...]
    cuda_graph: bool
    min_tokens: int
    stride: int
    coarse: int | None
    rounds: int
    visit_s: float
    noise_target: float
    blocks: bool
    seed: int

    @classmethod
    def build(
        cls,
        model: nn.Module,
        *,
        method: Method | str = "pomt",
        layer: int | None = None,
        mode: str = "deployed",
        batch_sizes: tuple[int, ...] = (1,),
        dtype: torch.dtype = torch.float32,
        cuda_graph: bool = False,
        min_tokens: int | None = None,
        stride: int = 1,
        coarse: int | None = None,
        rounds: int = 5,
        visit_s: float = 0.1,
        noise_target: float = 0.01,
        blocks: bool = True,
        seed: int = 0,
    ) -> Settings:
        """Settings for a model, which is only looked at.

        Args:
            method: a method, or the name of one.
            layer: by default the method's own, when that is one block.
            min_tokens: by default the fewest that the method leaves.
            Others: see the attributes.

        Raises:
            UnsupportedModelError: the model is not understood.
            TypeError: an argument of the wrong type.
            ValueError: a value that is not allowed; the message names it.
        """
        check_choice("mode", mode, MODES)
        host = inspect_host(model)
        method = (methods.create(method) if isinstance(method, str) else method).for_host(host)
        method.check_host(host)
        layer = _checked_layer(layer, method, host)
        least = max(1, method.min_keep(host.num_patches))
        check_int("min_tokens", least if min_tokens is None else min_tokens, least, host.num_patches - 1)
        check_int("stride", stride, 1)
        if coarse is not None:
            check_int("coarse", coarse, stride + 1)
            if coarse % stride:
                raise ValueError(f"coarse must be a multiple of the stride {stride}, got {coarse}")
        check_int("rounds", rounds, 3)
        check_int("seed", seed, 0)
        _check_positive("visit_s", visit_s)
        _check_positive("noise_target", noise_target)
        check_bool("cuda_graph", cuda_graph)
        check_bool("blocks", blocks)
        if not batch_sizes or len(set(batch_sizes)) < len(batch_sizes):
            raise ValueError(f"batch_sizes must be at least one size, each once, got {batch_sizes}")
        for size in batch_sizes:
            check_int("batch_sizes", size, 1)
        return cls(
            model=host.model,
            input_size=host.input_size,
            num_prefix_tokens=host.num_prefix_tokens,
            num_patches=host.num_patches,
            channels=host.channels,
            mode=mode,
            method=method.name,
            options=method.options(),
            layer=layer,
            dtype=str(dtype).removeprefix("torch."),
            batch_sizes=tuple(batch_sizes),
            cuda_graph=cuda_graph,
            min_tokens=least if min_tokens is None else min_tokens,
            stride=stride,
            coarse=coarse,
            rounds=rounds,
            visit_s=visit_s,
            noise_target=noise_target,
            blocks=blocks,
            seed=seed,
        )

    def measured(self) -> tuple[Method, int]:
        """The method that runs while latency is measured, and its layer."""
        if self.mode == "paper":
            return Random(seed=self.seed), 0
        return self.deployed(), self.layer

    def deployed(self) -> Method:
        """The method that a schedule is made for."""
        return methods.create(self.method, **self.options)

    def counts(self) -> tuple[int, ...]:
        """All token counts that may be measured, ascending; the dense model's is the last."""
        return stride_grid(self.min_tokens, self.num_patches, self.stride)

    def first_counts(self) -> tuple[int, ...]:
        """Those that are measured first."""
        return stride_grid(self.min_tokens, self.num_patches, self.coarse or self.stride)

    def workload(self, batch_size: int, tokens: int) -> int:
        """Batch size times tokens (prefix included) times channels: the workload of arXiv 2407.05941."""
        return batch_size * (self.num_prefix_tokens + tokens) * self.channels

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What must be the same for two measurements to belong to one profile."""
    found = environment(device)
    return {
        "device": found["device"],
        "device_type": found["device_type"],
        "threads": found["threads"],
        "torch": found["versions"]["torch"],
        "tokenprune": found["versions"]["tokenprune"],
        "cuda_driver": found["cuda"]["driver"],
    }


def _checked_layer(layer: int | None, method: Method, host: Host) -> int:
    own = default_layers(method, host)
    if not own:
        raise ValueError(f"method must prune tokens, got {method.name!r}, which prunes none")
    if layer is None:
        if len(own) > 1:
            raise ValueError(
                f"layer must be given: {method.name} prunes at blocks {', '.join(map(str, own))} unless told "
                "otherwise, and a profile has one pruning layer"
            )
        return own[0]
    check_int("layer", layer, 0, host.depth - 1 - method.class_token_only, f"{host.model} has {host.depth} blocks")
    return layer


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")
