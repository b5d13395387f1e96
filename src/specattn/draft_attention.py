"""The draft's attention rows of a round, as the selection methods see them."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.geometry import KVGeometry


class DraftAttention:
    """Attention distributions of the draft's heads for the rows of one round.

    Args:
        geometry: the draft's.
        batch, rows: requests and draft steps of the round.
        length: host bound on the visible tokens.
        heads: int64 ``[n]``, sorted numbers ``layer * query_heads + head`` of the heads to keep; all if ``None``.

    Attributes:
        probabilities: float32 ``[batch, rows, heads, length]``, zero beyond what a row saw.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        batch: int,
        rows: int,
        length: int,
        device: torch.device,
        heads: Tensor | None = None,
    ) -> None:
        self.geometry = geometry
        self.heads = heads
        self._kept = _kept_heads(geometry, heads)
        count = sum(local.numel() for _, local in self._kept.values())
        self.probabilities = torch.zeros(batch, rows, count, length, device=device)

    def wants(self, layer: int) -> bool:
        """Whether any head of ``layer`` is kept."""
        return layer in self._kept

    def record(self, layer: int, request: int, first_row: int, first: int, probabilities: Tensor) -> None:
        """Keep rows ``first_row``, ... of one request.

        Args:
            first: position of the first token in ``probabilities`` ``[query_heads, rows, length]``.
        """
        offset, local = self._kept[layer]
        _, rows, length = probabilities.shape
        kept = probabilities[local.to(probabilities.device)].transpose(0, 1)
        target = self.probabilities[request, first_row : first_row + rows, offset : offset + local.numel()]
        target[..., first : first + length] = kept

    def by_layer(self) -> Tensor:
        """Distributions averaged over a layer's heads: ``[batch, rows, layers, length]``. Needs all heads."""
        batch, rows, _, length = self.probabilities.shape
        split = self.probabilities.view(batch, rows, self.geometry.layers, self.geometry.query_heads, length)
        return split.mean(3)


def _kept_heads(geometry: KVGeometry, heads: Tensor | None) -> dict[int, tuple[int, Tensor]]:
    """For each layer with kept heads: where they begin in the export, and their numbers in the layer."""
    if heads is None:
        heads = torch.arange(geometry.layers * geometry.query_heads)
    result: dict[int, tuple[int, Tensor]] = {}
    offset = 0
    for layer in range(geometry.layers):
        local = heads[heads // geometry.query_heads == layer].cpu() % geometry.query_heads
        if local.numel():
            result[layer] = (offset, local)
            offset += local.numel()
    return result
