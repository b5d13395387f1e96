"""The prefill methods by name."""

from __future__ import annotations

from specattn.prefill.base import PrefillMethod
from specattn.registry import Registry

PREFILLS: dict[str, str] = {
    "dense": "specattn.prefill.dense:Dense",
}
"""Where each prefill method lives; its module is imported when it is asked for."""

REGISTRY = Registry("prefill method", PrefillMethod, PREFILLS, group="specattn.prefills")


def parse_prefill(text: str) -> PrefillMethod:
    """Build a prefill method from ``name:option=value``, see :meth:`specattn.registry.Registry.parse`."""
    return REGISTRY.parse(text)
