"""The draft's attention rows of a round, as the selection methods see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.geometry import KVGeometry


@dataclass(frozen=True)
class ExportedHeads:
    """Which of the draft's heads export their attention, and where each layer's go: the same in every round.

    Attributes:
        count: how many there are.
        layers: for each layer with such heads where they begin in the export, and int64 their numbers in the layer.
    """

    geometry: KVGeometry
    count: int
    layers: Mapping[int, tuple[int, Tensor]]

    @classmethod
    def of(cls, geometry: KVGeometry, heads: Tensor | None, device: torch.device) -> ExportedHeads:
        """Of int64 ``heads`` ``[n]``, sorted numbers ``layer * query_heads + head``; of all heads if ``None``."""
        numbers = torch.arange(geometry.layers * geometry.query_heads) if heads is None else heads.cpu()
        layers, offset = {}, 0
        for layer in range(geometry.layers):
            local = numbers[numbers // geometry.query_heads == layer] % geometry.query_heads
            if local.numel():
                layers[layer] = (offset, local.to(device))
                offset += local.numel()
        return cls(geometry, offset, layers)


class DraftAttention:
    """Attention distributions of the draft's heads for the rows of one round.

    Args:
        heads: the heads that are kept.
        batch, rows: requests and draft steps of the round.
        length: host bound on the visible tokens.

    Attributes:
        probabilities: float32 ``[batch, rows, heads, length]``, zero beyond what a row saw.
    """

    def __init__(
        self, heads: ExportedHeads, *, batch: int, rows: int, length: int, device: torch.device
    ) -> None:
        self.heads = heads
        self.probabilities = torch.zeros(batch, rows, heads.count, length, device=device)

    @property
    def rows(self) -> int:
        """Draft steps of the round."""
        return self.probabilities.shape[1]

    def wants(self, layer: int) -> bool:
        """Whether any head of ``layer`` is kept."""
        return layer in self.heads.layers

    def record(self, layer: int, request: int, first_row: int, first: int, probabilities: Tensor) -> None:
        """Keep rows ``first_row``, ... of one request.

        Args:
            first: position of the first token in ``probabilities`` ``[query_heads, rows, length]``.
        """
        offset, local = self.heads.layers[layer]
        _, rows, length = probabilities.shape
        target = self.probabilities[request, first_row : first_row + rows, offset : offset + local.numel()]
        target[..., first : first + length] = probabilities[local].transpose(0, 1)

    def by_layer(self) -> Tensor:
        """Distributions averaged over a layer's heads: ``[batch, rows, layers, length]``. Needs all heads."""
        geometry = self.heads.geometry
        split = self.probabilities.unflatten(2, (geometry.layers, geometry.query_heads))
        return split.mean(3)
