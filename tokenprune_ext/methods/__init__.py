"""The pruning methods: one file each, found by name through the registry."""

from .ats import ATS
from .auto import Auto
from .base import Method, available, create, register
from .dense import Dense
from .dynamicvit import DynamicViT
from .evit import EViT
from .peaks import Peaks
from .pomt import Pomt
from .random import Random
from .scored import ScoredMethod
from .tome import ToMe
from .topk import TopK
from .zero_tprune import ZeroTPrune

__all__ = [
    "ATS",
    "Auto",
    "Dense",
    "DynamicViT",
    "EViT",
    "Method",
    "Peaks",
    "Pomt",
    "Random",
    "ScoredMethod",
    "ToMe",
    "TopK",
    "ZeroTPrune",
    "available",
    "create",
    "register",
]
