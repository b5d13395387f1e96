"""How much of the true attention the selected tokens hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.attention import LayerCall, Step
from specattn.kernels.dense_attention import attention_probabilities
from specattn.selection.base import Selection


@dataclass(frozen=True)
class Breakdown:
    """Where a method spends its reads. Means over rounds; a row a sparse layer, a column a KV head.

    Attributes:
        layers: numbers of the sparse layers.
        mass: share of the exact attention that the selected tokens hold.
        density: share of the tokens that are selected.
    """

    layers: list[int]
    mass: list[list[float]]
    density: list[list[float]]


class AttentionMass:
    """Observes sparse layers: the share of the exact attention mass that the selected tokens hold."""

    def __init__(self) -> None:
        # Sums [2, batch, kv_heads] of mass and density, and how many rounds they are of.
        self._sums: dict[int, Tensor] = {}
        self._counts: Counter[int] = Counter()

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        shares, densities = [], []
        for request, start in enumerate(step.starts):
            segments, first = step.segments(call.layer, request, None)
            exact = attention_probabilities(call.query[request], segments, start, first, call.scaling)
            mask = selection.to_mask(exact.shape[-1])[request]
            kept = exact.unflatten(0, (mask.shape[0], -1)) * mask[:, None, None]
            shares.append(kept.sum(-1).mean((1, 2)))
            densities.append(mask.double().mean(-1))
        self.add(call.layer, shares, densities)

    def add(self, layer: int, shares: Sequence[Tensor], densities: Sequence[Tensor]) -> None:
        """Count one layer of a round, with the share and the density ``[kv_heads]`` of each request."""
        figures = torch.stack([torch.stack(list(shares)).double(), torch.stack(list(densities)).double()])
        self._sums[layer] = self._sums.get(layer, 0) + figures
        self._counts[layer] += 1

    def mean(self, request: int) -> float:
        """The mean mass over layers, heads and rows; 1 where nothing was sparse."""
        if not self._sums:
            return 1.0
        total = sum(float(sums[0, request].mean()) for sums in self._sums.values())
        return total / self._counts.total()

    def breakdown(self, request: int) -> Breakdown:
        """The same by layer and KV head."""
        layers = sorted(self._sums)
        means = [(self._sums[layer][:, request] / self._counts[layer]).tolist() for layer in layers]
        return Breakdown(layers, [mass for mass, _ in means], [density for _, density in means])
