"""A target, its draft and the tokenizer that they share: loading them, and refusing what cannot work.

The names are imported when they are first used, so that asking for the built-in names costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specattn.pairs.builtin import BUILTIN, MODELS
    from specattn.pairs.checks import SUPPORTED
    from specattn.pairs.load import FoundPair, find_pair, load_pair, make_pair
    from specattn.pairs.pair import Pair

__all__ = ["BUILTIN", "MODELS", "SUPPORTED", "FoundPair", "Pair", "find_pair", "load_pair", "make_pair"]

_HOME = {
    "BUILTIN": "builtin",
    "MODELS": "builtin",
    "SUPPORTED": "checks",
    "FoundPair": "load",
    "Pair": "pair",
    "find_pair": "load",
    "load_pair": "load",
    "make_pair": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
