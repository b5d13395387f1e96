"""The calibrated map between a target and its draft: which draft attention predicts which target attention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping, MappingMetadata
    from specattn.mapping.calibrate import calibrate

__all__ = ["Mapping", "MappingMetadata", "calibrate"]

_HOMES = {"Mapping": "artifact", "MappingMetadata": "artifact", "calibrate": "calibrate"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Bound here, because importing the module ``calibrate`` has just bound the module under that name.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
