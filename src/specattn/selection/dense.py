"""Dense attention: everything visible is read. The reference, and plain speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from specattn.selection.base import Method


@dataclass(frozen=True)
class Dense(Method):
    """Read everything."""

    name: ClassVar[str] = "dense"

    def is_dense(self, layer: int) -> bool:
        return True
