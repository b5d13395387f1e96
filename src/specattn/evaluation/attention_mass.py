"""How much of the true attention the selected tokens hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specattn.attention import LayerCall, Step
from specattn.kernels.dense_attention import attention_probabilities
from specattn.selection.base import Selection


class AttentionMass:
    """Observes sparse layers: the share of the exact attention mass that the selected tokens hold."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._sums = torch.zeros(batch, dtype=torch.float64, device=device)
        self._count = 0

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        shares = []
        for request, start in enumerate(step.starts):
            segments, first = step.segments(call.layer, request, None)
            exact = attention_probabilities(call.query[request], segments, start, first, call.scaling)
            mask = selection.to_mask(exact.shape[-1])[request]
            kept = exact.unflatten(0, (mask.shape[0], -1)) * mask[:, None, None]
            shares.append(kept.sum(-1).mean())
        self.add(shares)

    def add(self, shares: Sequence[Tensor]) -> None:
        """Count one layer of a round, with the share of each request."""
        self._sums += torch.stack(list(shares))
        self._count += 1

    def mean(self, request: int) -> float:
        """The mean over layers, heads and rows; 1 where nothing was sparse."""
        return float(self._sums[request]) / self._count if self._count else 1.0
