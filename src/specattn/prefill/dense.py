"""Dense prefill: every causal product is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput


@dataclass(frozen=True)
class Dense(PrefillMethod):
    """Compute everything."""

    name: ClassVar[str] = "dense"

    def attention(self, call: PrefillCall) -> PrefillOutput:
        out = dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling)
        return PrefillOutput(out, out.new_ones(()))
