"""Quest's page summaries (arXiv 2406.10774): the element-wise minimum and maximum of a page's keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.geometry import KVGeometry
from specattn.stores.base import KeyPool, touched_pages


@dataclass(frozen=True)
class PageBounds:
    """Bounds of the keys in stretches of ``page`` tokens, a power of two."""

    page: int = 16

    def build(self, pool: KeyPool) -> PageBoundsStore:
        """Empty bounds for ``pool``."""
        return PageBoundsStore(pool, self.page)

    def nbytes(self, geometry: KVGeometry, tokens: int) -> int:
        """Bytes for ``tokens`` rows: a minimum and a maximum are as large as one token's key and value."""
        return -(-tokens // self.page) * geometry.token_bytes


class PageBoundsStore:
    """The bounds, worked out anew for every page that an append touches, from the tokens that count by then.

    Attributes:
        bounds: for each layer ``[pages, 2, kv_heads, head_dim]``, minima and maxima, in the keys' dtype.
    """

    def __init__(self, pool: KeyPool, page: int) -> None:
        self.pool, self.page = pool, page
        self.bounds = [
            torch.zeros(-(-keys.shape[0] // page), 2, *keys.shape[1:], dtype=keys.dtype, device=keys.device)
            for keys in pool.keys
        ]

    @property
    def nbytes(self) -> int:
        return sum(bounds.nbytes for bounds in self.bounds)

    def append(self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor) -> None:
        pages = touched_pages(positions, self.page)
        tokens = pages[..., None] * self.page + torch.arange(self.page, device=positions.device)
        # Beyond the last token lies what was rejected, or another request's past: the last token stands in for it.
        held = self.pool.keys[layer][self.pool.rows(slots, tokens.clamp(max=positions[:, -1:, None]))]
        summary = torch.stack(held.aminmax(dim=2), dim=2)  # [batch, pages, 2, kv_heads, head_dim]
        self.bounds[layer][self._entry(slots, pages)] = summary

    def _entry(self, slots: Tensor, pages: Tensor) -> Tensor:
        return self.pool.rows(slots, pages * self.page) // self.page
