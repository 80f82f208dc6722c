"""Token pruning for vision transformers.

``torch.ops.tokenprune.*`` exist once this package is imported; :func:`apply` prunes a pretrained model.
"""

from importlib import metadata

from . import ops
from ._loader import load

try:
    __version__ = metadata.version("tokenprune")
except metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

LIBRARIES = load()

__all__ = ["LIBRARIES", "__version__", "ops"]
