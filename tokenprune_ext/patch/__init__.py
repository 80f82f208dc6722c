"""How pruning gets into a model: what a method sees of a block, and the families of models that can be patched."""

from . import timm_vit as _timm_vit  # registers its family
from .adapter import HostAdapter, Projected, adapter_of, attend, register_host
from .block import BlockPlan, PrunedBlock
from .context import AttentionContext, Reduced
from .grid import restore
from .host import Host, UnsupportedModelError
from .install import inspect_host, install, record_of, uninstall
from .state import TokenState

__all__ = [
    "AttentionContext",
    "BlockPlan",
    "Host",
    "HostAdapter",
    "Projected",
    "PrunedBlock",
    "Reduced",
    "TokenState",
    "UnsupportedModelError",
    "adapter_of",
    "attend",
    "inspect_host",
    "install",
    "record_of",
    "register_host",
    "restore",
    "uninstall",
]
del _timm_vit
