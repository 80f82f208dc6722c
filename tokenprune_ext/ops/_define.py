"""How an operator of this library is defined.

Python owns the contract: schema, reference, fake kernel and gradient are registered here. The compiled libraries only
add kernels for the CPU and CUDA dispatch keys, in any order and also not at all: then the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
) -> Callable[..., Any]:
    """Register one operator and return it.

    Args:
        schema: the operator's schema, ``name(arguments) -> results``.
        reference: the same function in plain torch: fallback of every device that has no kernel, oracle of the tests,
            baseline of the benchmarks.
        fake: shapes and dtypes of the results, after the argument checks.
        setup_context: what the gradient needs (see ``torch.library.register_autograd``).
        backward: the gradient.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
