"""The method to take when one does not want to choose."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from tokenprune_ext.patch.host import Host

from .base import Method, register
from .peaks import Peaks


@register
@dataclass(frozen=True, kw_only=True)
class Auto(Peaks):
    """Peaks, with the class-token-only last block where the model allows it. A schedule names what it became."""

    name: ClassVar[str] = "auto"

    def for_host(self, host: Host) -> Method:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(Peaks)}
        return Peaks(**{**options, "class_token_only": host.head_tokens is not None})
