"""The prefill methods by name."""

from __future__ import annotations

from typing import Any

from specattn.prefill.base import PrefillMethod
from specattn.registry import Registry

PREFILLS: dict[str, str] = {
    "dense": "specattn.prefill.dense:Dense",
    "sparge": "specattn.prefill.sparge:Sparge",
    "minference": "specattn.prefill.minference:MInference",
    "flexprefill": "specattn.prefill.flexprefill:FlexPrefill",
}
"""Where each prefill method lives; its module is imported when it is asked for."""

REGISTRY = Registry("prefill method", PrefillMethod, PREFILLS, group="specattn.prefills")


def parse_prefill(text: str) -> PrefillMethod:
    """Build a prefill method from ``name:option=value``, see :meth:`specattn.registry.Registry.parse`."""
    return REGISTRY.parse(text)


def resolve_prefill(prefill: PrefillMethod | str, config: Any) -> PrefillMethod:
    """The prefill method itself, after the check that it can serve the model of this configuration.

    Raises:
        UsageError: for an unknown name or option, or a model that the method cannot serve.
    """
    method = parse_prefill(prefill) if isinstance(prefill, str) else prefill
    method.check(config)
    return method
