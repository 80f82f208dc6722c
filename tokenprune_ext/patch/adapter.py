"""What this package has to know of a family of models, and the registry of the families it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from .host import Host, UnsupportedModelError
from .mixin import Mixin
from .projection import Projected, attend


class HostAdapter(ABC):
    """A family of models: where their blocks are, and the three parts a transformer block consists of.

    With ``x`` the residual stream ``[B, N, C]``, a block is::

        p = project(block, x, queries=N)                        # norm, q, k, v
        x = add_attention(block, x, attend(block, p))           # attention, output projection, residual
        x = add_mlp(block, x)                                   # norm, MLP, residual

    and must compute what the model's own block computes, bit for bit where it can. Tokens leave between the last two
    lines or behind them. Register a subclass with :func:`register_host`.

    Class attributes:
        supported: what the family covers, for error messages.
        mixin: goes in front of the model's class while it is pruned, with functions that replace its own; None for
            nothing.
    """

    supported: ClassVar[str]
    mixin: ClassVar[type[Mixin] | None] = None

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of this family; cheap, and never raises."""

    @abstractmethod
    def inspect(self, model: nn.Module) -> Host:
        """The geometry of a model of this family, patched or not. Changes nothing.

        Raises:
            UnsupportedModelError: a part of it is not understood; the message names it.
        """

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks, in the order they run in; each is called with the tokens first and returns them."""

    @abstractmethod
    def project(self, block: Any, x: Tensor, queries: int, position: Tensor | None, **call: Any) -> Projected:
        """Queries, keys and values of tokens ``[B, N, C]``, after everything that acts on them before the product.

        Args:
            block: one of :meth:`blocks`.
            x: the residual stream that enters the block.
            queries: only the first so many tokens ask; at most N.
            position: where on the patch grid the patch tokens are, int64 ``[B, N - num_prefix]``; None for all in
                their places. Only blocks of a ``positional`` host need it.
            call: what the model hands to its blocks beside the tokens.
        """

    @abstractmethod
    def add_attention(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        """The residual stream ``[B, Q, C]`` of the tokens that asked, with the attention's output added.

        Args:
            block: one of :meth:`blocks`.
            x: the residual stream of those tokens, as it entered the block, ``[B, Q, C]``.
            heads: output of every head, ``[B, H, Q, d]``.
        """

    @abstractmethod
    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        """The residual stream ``[B, N, C]`` with the MLP's output added."""

    def attend(self, block: Any, p: Projected, bias: Tensor | None) -> Tensor:
        """Output of every head, ``[B, H, Q, d]``. Default: torch's fused attention, or as timm computes it without.

        Args:
            block: one of :meth:`blocks`.
            p: what :meth:`project` returned.
            bias: added to the logits on top of ``p.bias``, ``[B, 1, 1, N]``; None for nothing.
        """
        return attend(p, bias)

    def call_arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the model hands to a block beside the tokens, checked, as keywords of :meth:`project`. Default: nothing.

        Raises:
            ValueError: something that does not work on a pruned model, like a mask.
        """
        if args or kwargs:
            raise ValueError(f"a pruned block of this family takes tokens alone, got {args} and {kwargs}")
        return {}

    def exporting(self) -> AbstractContextManager[None]:
        """What has to hold while a model of this family goes through ``torch.export``. Default: nothing."""
        return nullcontext()

    def unpatchable(self, block: nn.Module) -> str | None:
        """Why a block cannot be patched as it is now (hooks inside it that would not run); None when it can."""
        return None


AdapterClass = TypeVar("AdapterClass", bound=type[HostAdapter])
_adapters: list[HostAdapter] = []


def register_host(cls: AdapterClass) -> AdapterClass:
    """Class decorator: make a family of models known. The latest that matches a model is asked first."""
    _adapters[:] = [cls(), *(known for known in _adapters if type(known) is not cls)]
    return cls


def adapter_of(model: nn.Module) -> HostAdapter:
    """The family a model belongs to.

    Raises:
        UnsupportedModelError: none matches.
    """
    for adapter in _adapters:
        if adapter.matches(model):
            return adapter
    known = "; ".join(adapter.supported for adapter in reversed(_adapters))
    raise UnsupportedModelError(f"{kind_of(model)} is not supported{_hint(model)}. Supported: {known}")


def _hint(model: nn.Module) -> str:
    """What to do instead with a model that is not supported itself."""
    if hasattr(model, "_orig_mod"):
        return "; patch the model before torch.compile wraps it"
    for name, part in model.named_modules():
        if any(adapter.matches(part) for adapter in _adapters):
            return f", but its {name} is: patch that, if nothing behind it needs the full grid of patches"
    return ""


def kind_of(module: object) -> str:
    """Full name of a module's class, for messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


class Parts(NamedTuple):
    """What an adapter knows of a kind of module.

    Attributes:
        needed: submodules it must have.
        optional: submodules it may have.
        own: parameters and buffers it may have itself.
    """

    needed: AbstractSet[str]
    optional: AbstractSet[str] = frozenset()
    own: AbstractSet[str] = frozenset()


def check_parts(name: str, module: nn.Module, known: Parts) -> None:
    """Whatever an adapter does not know of could change the result and must not be left out silently.

    Args:
        name: where the module is in the model, for the message.
        module: what to look at.
        known: what it may consist of.

    Raises:
        UnsupportedModelError: another part is there, one is missing, or ``forward`` was replaced on the instance.
    """
    parts = {part for part, child in module._modules.items() if child is not None}
    tensors = {part for part, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
    unknown, missing = (parts - known.needed - known.optional) | (tensors - known.own), known.needed - parts
    if unknown or missing:
        raise unsupported(name, f"unknown parts {sorted(unknown)}, missing parts {sorted(missing)}")
    if "forward" in vars(module):
        raise unsupported(name, "its forward was replaced on this instance by other software")


def unsupported(part: str, what: str) -> UnsupportedModelError:
    """The error that refuses a model because of one part of it."""
    return UnsupportedModelError(f"{part} is not supported: {what}")
