"""How pruning gets into a model: what a method sees of a block, and the families of models that can be patched."""

from . import timm_beit as _timm_beit  # registers its family, as do the next
from . import timm_eva as _timm_eva
from . import timm_vit as _timm_vit
from . import transformers_vit as _transformers_vit
from .adapter import HostAdapter, Parts, adapter_of, check_parts, register_host, unsupported
from .block import BlockPlan, PrunedBlock
from .context import AttentionContext, Reduced
from .grid import restore
from .host import Host, UnsupportedModelError
from .install import inspect_host, install, record_of, uninstall
from .projection import Projected, attend, split_heads
from .qkv_blocks import QKVBlockAdapter
from .state import TokenState

__all__ = [
    "AttentionContext",
    "BlockPlan",
    "Host",
    "HostAdapter",
    "Parts",
    "Projected",
    "PrunedBlock",
    "QKVBlockAdapter",
    "Reduced",
    "TokenState",
    "UnsupportedModelError",
    "adapter_of",
    "attend",
    "check_parts",
    "inspect_host",
    "install",
    "record_of",
    "register_host",
    "restore",
    "split_heads",
    "uninstall",
    "unsupported",
]
del _timm_beit, _timm_eva, _timm_vit, _transformers_vit
