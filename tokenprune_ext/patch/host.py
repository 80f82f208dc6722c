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
        num_patches: patch tokens of one image.
    """

    model: str
    depth: int
    input_size: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool
    num_patches: int
