"""How pruning gets into a model: what a method sees of a block, and the families of models that can be patched."""

from .context import AttentionContext, Reduced
from .host import Host, UnsupportedModelError
from .timm_vit import PrunedBlock, PruningStep, inspect_host, install, record_of, uninstall

__all__ = [
    "AttentionContext",
    "Host",
    "PrunedBlock",
    "PruningStep",
    "Reduced",
    "UnsupportedModelError",
    "inspect_host",
    "install",
    "record_of",
    "uninstall",
]
