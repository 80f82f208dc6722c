"""Schedules: how many patch tokens leave each pruning layer, for one model and one method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from . import methods
from .counts import check_integral, checked_layers, counts_from_keep, counts_from_macs
from .methods import Method
from .patch import Host, inspect_host

FORMAT = 1


@dataclass(frozen=True)
class Schedule:
    """A complete, checked description of a pruned model apart from its weights.

    Attributes:
        model: timm architecture name, for information; any model with the same token geometry takes the schedule.
        input_size: height and width of the images, in pixels.
        num_prefix_tokens: tokens in front of the patches.
        num_patches: patch tokens that enter the first block.
        method: registered name of the method.
        options: options of the method; those left out get their defaults.
        keep: 0-based block index -> patch tokens that leave the block (a fused token is one of them).
        origin: how the schedule was found, as plain JSON values: the command, the device, what was measured. Changes
            nothing in what the schedule does; `apply` warns on another device than ``origin["device"]``.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value that is not allowed; the message names the field.
    """

    model: str
    input_size: tuple[int, int]
    num_prefix_tokens: int
    num_patches: int
    method: str
    keep: dict[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("model", "method"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        if not isinstance(self.input_size, list | tuple) or len(self.input_size) != 2:
            raise TypeError(f"input_size must be height and width, got {self.input_size!r}")
        for side in self.input_size:
            check_integral("input_size", side, 1)
        check_integral("num_prefix_tokens", self.num_prefix_tokens, 0)
        check_integral("num_patches", self.num_patches, 1)
        for name in ("options", "keep", "origin"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        method = self.build_method()
        _check_keep(self.keep, self.num_patches, method)
        object.__setattr__(self, "input_size", tuple(map(int, self.input_size)))
        object.__setattr__(self, "keep", {int(layer): int(count) for layer, count in self.keep.items()})
        object.__setattr__(self, "options", method.options())

    @classmethod
    def build(
        cls,
        model: nn.Module,
        method: Method | str,
        *,
        layers: Sequence[int] | None = None,
        keep: float | Sequence[float | int] | None = None,
        macs: float | None = None,
    ) -> Schedule:
        """The schedule of a method for a model, from keep ratios, token counts or a cost target.

        Args:
            model: a supported model, patched or not; it is only looked at.
            method: a method, or the registered name of one with its default options.
            layers: 0-based indices of the blocks that prune, ascending; the method's own choice by default.
            keep: a keep ratio in (0, 1] for every pruning layer; or one entry a layer, each a float (ratio of the patch
                tokens that enter the layer) or an int (patch tokens that leave it).
            macs: target as a fraction in (0, 1] of the dense model's MACs in the blocks, with the MACs of choosing and
                merging tokens charged. The method's largest plan (for most: one common keep ratio) within it is taken.

        Raises:
            UnsupportedModelError: the model is not understood.
            TypeError: an argument of the wrong type.
            ValueError: not exactly one of ``keep`` and ``macs``; a value that is not allowed; a target out of reach.
        """
        host = inspect_host(model)
        method = _registered(method).for_host(host)
        method.check_host(host)
        chosen = default_layers(method, host) if layers is None else checked_layers(layers, host.depth)
        if not chosen and not keep is macs is None:
            raise ValueError(f"keep and macs must not be given: {method.name} prunes nothing")
        if chosen and (keep is None) == (macs is None):
            raise ValueError("exactly one of keep and macs must be given")
        if not chosen:
            counts = {}
        elif keep is not None:
            counts = counts_from_keep(keep, chosen, host.num_patches, method)
        else:
            counts = counts_from_macs(macs, chosen, model, host, method)
        schedule = cls(
            model=host.model,
            input_size=host.input_size,
            num_prefix_tokens=host.num_prefix_tokens,
            num_patches=host.num_patches,
            method=method.name,
            options=method.options(),
            keep=counts,
        )
        schedule.check(host)
        return schedule

    def build_method(self) -> Method:
        """The method with its options."""
        return methods.create(self.method, **self.options)

    def entering(self) -> dict[int, int]:
        """Patch tokens that enter each layer of ``keep``."""
        return dict(zip(self.keep, (self.num_patches, *self.keep.values()), strict=False))

    def pruning(self) -> tuple[int, ...]:
        """The layers that fewer patch tokens leave than enter."""
        entering = self.entering()
        return tuple(layer for layer, count in self.keep.items() if count < entering[layer])

    def check(self, host: Host) -> None:
        """Raises ValueError when the schedule or its method does not fit the model."""
        for name in ("input_size", "num_prefix_tokens", "num_patches"):
            if getattr(self, name) != getattr(host, name):
                raise ValueError(
                    f"schedule for {self.model} has {name} {getattr(self, name)}, but {host.model} has "
                    f"{getattr(host, name)}"
                )
        if self.keep and max(self.keep) >= host.depth:
            raise ValueError(f"keep names layer {max(self.keep)}, but {host.model} has layers 0..{host.depth - 1}")
        method = self.build_method()
        method.check_host(host)
        last = host.depth - 1
        if method.class_token_only and self.keep.get(last, 0) < self.entering().get(last, 0):
            raise ValueError(f"layer {last} computes the class token alone and must not prune")

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        Path(path).write_text(self.to_json(indent=2) + "\n", "utf-8")

    def to_json(self, indent: int | None = None) -> str:
        """The schedule as :meth:`save` writes it."""
        content = {"format": FORMAT, **{item.name: getattr(self, item.name) for item in fields(self)}}
        return json.dumps(content, indent=indent)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not JSON, or not a schedule; the message names the file and the field.
        """
        try:
            return cls.from_json(Path(path).read_text("utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no such schedule file: {path}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule {path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule that :meth:`to_json` gave.

        Raises:
            TypeError: a field of the wrong type.
            ValueError: not JSON, not a schedule, or a method that is not registered; the message names the field.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected an object with the fields of a schedule, got {type(content).__name__}")
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        known = {item.name for item in fields(cls)}
        unknown, missing = sorted(content.keys() - known), sorted(known - content.keys() - {"origin"})
        if unknown or missing:
            raise ValueError(f"unknown fields {unknown}, missing fields {missing}")
        if not isinstance(content["keep"], dict) or not all(layer.isdecimal() for layer in content["keep"]):
            raise ValueError(f"keep must map block indices to token counts, got {content['keep']!r}")
        content["keep"] = {int(layer): count for layer, count in content["keep"].items()}
        return cls(**content)


def _check_keep(keep: dict[int, int], num_patches: int, method: Method) -> None:
    for layer in keep:
        check_integral("keep layer", layer, 0)
    if any(later <= earlier for earlier, later in pairwise(keep)):
        raise ValueError(f"keep must list its layers in ascending order, got {list(keep)}")
    entering = num_patches
    for layer, count in keep.items():
        check_integral(f"keep[{layer}]", count, 1)
        if count > entering:
            raise ValueError(f"keep[{layer}] is {count}, but only {entering} patch tokens enter layer {layer}")
        least = min(method.min_keep(entering), entering)
        if count < least:
            raise ValueError(f"keep[{layer}] is {count}, but {method.name} leaves at least {least} of {entering}")
        entering = count


def default_layers(method: Method, host: Host) -> tuple[int, ...]:
    """Where a method prunes by its own choice; never in a last block that computes the class token alone."""
    pruning = host.depth - method.class_token_only
    return tuple(layer for layer in method.default_layers(host.depth) if layer < pruning)


def _registered(method: Method | str) -> Method:
    """The method; one that a schedule file could not name is refused."""
    if isinstance(method, str):
        return methods.create(method)
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method or the name of one, got {method!r}")
    if type(methods.create(method.name, **method.options())) is not type(method):
        raise ValueError(f"{type(method).__qualname__} is not the class registered as {method.name!r}")
    return method
