"""How an operator of this library is defined.

Python owns the contract: schema, reference, fake kernel and gradient are registered here. The compiled libraries only
add kernels for the CPU and CUDA dispatch keys, in any order and also not at all: then the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "tokenprune"

# Lives as long as the process: the registrations go when the object does.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    macs: Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[..., Any]:
    """Register one operator and return the call of it, which takes its arguments in order.

    The kernels check their arguments. What they refuse is looked at again by ``fake``, for an error that names the
    argument; nothing is checked twice where nothing is wrong, since on small inputs that takes as long as the kernel.

    Args:
        schema: the operator's schema, ``name(arguments) -> results``.
        reference: the same function in plain torch: fallback of every device that has no kernel, oracle of the tests,
            baseline of the benchmarks.
        fake: shapes and dtypes of the results, after the argument checks.
        setup_context: what the gradient needs (see ``torch.library.register_autograd``).
        backward: the gradient.
        macs: multiply-accumulates, from all arguments by name with every tensor replaced by its shape; for torch's
            ``FlopCounterMode``, which counts two operations each. None where data is moved and little computed.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if macs is not None:
        _count_flops(packet, macs)
    return _call(packet.default, fake)


def _call(operator: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    arguments = operator._schema.arguments
    integers = [(place, arg.name) for place, arg in enumerate(arguments) if isinstance(arg.type, torch.IntType)]

    def call(*args: Any) -> Any:
        for place, name in integers:
            if isinstance(args[place], bool):  # torch would take it for 0 or 1
                raise TypeError(f"{name} must be an int, got {args[place]!r}")
        try:
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return operator(*args)
            with torch._C._AutoDispatchBelowAutograd():  # else torch asks Python whether there is a gradient
                return operator(*args)
        except Exception as error:
            refused = error
        fake(*args)
        raise refused

    return call


def _count_flops(packet: Any, macs: Callable[[Mapping[str, Any]], int]) -> None:
    defaults = {arg.name: arg.default_value for arg in packet.default._schema.arguments}

    @register_flop_formula(packet)
    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * macs({**defaults, **dict(zip(defaults, args, strict=False)), **kwargs})
