"""The calibrated map between a target and its draft: whose attention predicts whose."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping, MappingMetadata

__all__ = ["Mapping", "MappingMetadata"]

_HOME = {"Mapping": "artifact", "MappingMetadata": "artifact"}

if not TYPE_CHECKING:  # a type checker takes the imports above, and so still sees a misspelled name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
