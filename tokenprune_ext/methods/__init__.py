"""The pruning methods: one file each, found by name through the registry."""

from .base import Method, available, create, register
from .pomt import Pomt
from .random import Random
from .topk import TopK
from .zero_tprune import ZeroTPrune

__all__ = ["Method", "Pomt", "Random", "TopK", "ZeroTPrune", "available", "create", "register"]
