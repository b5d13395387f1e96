"""The contract between a prefill method and everything around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specattn.registry import Member


@dataclass(frozen=True)
class PrefillCall:
    """The attention of a stretch of a prompt in one layer.

    Attributes:
        layer: its number.
        query: ``[rows, query_heads, head_dim]``, rows at positions ``start``, ``start + 1``, ...
        key, value: ``[start + rows, kv_heads, head_dim]``: everything up to the last row, in token order.
        start: tokens before the first row.
        scaling: factor of the attention logits.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    start: int
    scaling: float


@dataclass(frozen=True)
class PrefillOutput:
    """What a prefill method made of a call.

    Attributes:
        out: ``[rows, query_heads, head_dim]``, in the query's dtype.
        computed: share of the causal query-key products that were computed, a scalar tensor on the device.
    """

    out: Tensor
    computed: Tensor


@dataclass(frozen=True)
class PrefillMethod(Member):
    """A prefill method: its options are the fields of a frozen dataclass."""

    def check(self, config: Any) -> None:
        """Refuse a model that the method cannot serve, by its transformers configuration, before any work.

        Raises:
            UsageError: naming what does not fit.
        """

    def attention(self, call: PrefillCall) -> PrefillOutput:
        """Causal attention of the call's rows, exact or approximate. Sliding-window layers never get here."""
        raise NotImplementedError
