"""What the rest of the package needs to know about a model, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass


class UnsupportedModelError(TypeError):
    """A model this package does not understand; the message names what it is and what is supported."""


@dataclass(frozen=True)
class Host:
    """The token geometry of a model.

    Attributes:
        model: architecture name in its library, e.g. ``vit_small_patch16_224``.
        depth: number of blocks.
        input_size: height and width of the input image, in pixels.
        num_prefix_tokens: tokens in front of the patches (class, distillation, registers); may be 0.
        has_class_token: whether token 0 is a class token.
        grid: rows and columns of patches.
        channels: width of the residual stream.
        head_tokens: how many leading tokens are all that is read behind the blocks (1 for a class token, 2 with a
            distillation token); None when the patch tokens are read too.
        positional: whether the blocks themselves need to know where a token was in the image (rotary embeddings,
            relative position bias).
        dynamic: whether images of another size may come; the counts of a schedule are then scaled with the patches.
        in_channels: colour channels of an image.
    """

    model: str
    depth: int
    input_size: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool
    grid: tuple[int, int]
    channels: int
    head_tokens: int | None = None
    positional: bool = False
    dynamic: bool = False
    in_channels: int = 3

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image of ``input_size``."""
        return self.grid[0] * self.grid[1]
