"""What is left of a model's channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tokenprune_ext.channels import PLACES, Widths, widths_of


@dataclass(frozen=True)
class WidthReport:
    """Kept widths of a model.

    Attributes:
        blocks: channels at the four places of every block.
        parameters: of the whole model.
    """

    blocks: tuple[Widths, ...]
    parameters: int

    def __str__(self) -> str:
        rows = [("block", *PLACES), *((index, *widths) for index, widths in enumerate(self.blocks))]
        lines = ["".join(f"{cell:>10}" for cell in row) for row in rows]
        return "\n".join([*lines, f"{self.parameters / 1e6:.2f} M parameters"])


def report(model: nn.Module) -> WidthReport:
    """The widths of a dense, gated or smaller model."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return WidthReport(tuple(widths_of(model)), parameters)
