"""specattn: long-context decoding that reads a tenth of the KV cache.

Public names are imported on first use, so that ``import specattn`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specattn.dropin import sparse_attention
    from specattn.engine import Engine
    from specattn.errors import CacheFullError, SpecAttnError, UsageError
    from specattn.generation import GenerationResult, generate
    from specattn.hilbert import hilbert_permutation
    from specattn.mapping.artifact import Mapping
    from specattn.mapping.calibrate import calibrate
    from specattn.pairs import Pair, load_pair, make_pair
    from specattn.prefill.drop_in import sparge_attention
    from specattn.prefill.pattern_search import choose_patterns
    from specattn.prefill.tune import tune_sparge
    from specattn.sampling import SamplingParams
    from specattn.selection.base import Method, Selection
    from specattn.selection.registry import get_method

__version__ = "0.1.0"

__all__ = [
    "CacheFullError",
    "Engine",
    "GenerationResult",
    "Mapping",
    "Method",
    "Pair",
    "SamplingParams",
    "Selection",
    "SpecAttnError",
    "UsageError",
    "calibrate",
    "choose_patterns",
    "generate",
    "get_method",
    "hilbert_permutation",
    "load_pair",
    "make_pair",
    "sparge_attention",
    "sparse_attention",
    "tune_sparge",
]

_MODULES = {
    "dropin": ("sparse_attention",),
    "engine": ("Engine",),
    "errors": ("CacheFullError", "SpecAttnError", "UsageError"),
    "generation": ("GenerationResult", "generate"),
    "hilbert": ("hilbert_permutation",),
    "mapping.artifact": ("Mapping",),
    "mapping.calibrate": ("calibrate",),
    "pairs": ("Pair", "load_pair", "make_pair"),
    "prefill.drop_in": ("sparge_attention",),
    "prefill.pattern_search": ("choose_patterns",),
    "prefill.tune": ("tune_sparge",),
    "sampling": ("SamplingParams",),
    "selection.base": ("Method", "Selection"),
    "selection.registry": ("get_method",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker takes the imports above, and so still sees a misspelled name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
