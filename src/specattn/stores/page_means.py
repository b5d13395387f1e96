"""The mean key and value of a page: what stands for its tokens when they are not read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.geometry import KVGeometry
from specattn.stores.base import KeyPool, touched_pages


@dataclass(frozen=True)
class PageMeans:
    """Means of the keys and of the values in stretches of ``page`` tokens, a power of two."""

    page: int = 64

    def build(self, pool: KeyPool) -> PageMeansStore:
        """Empty means for ``pool``."""
        return PageMeansStore(pool, self.page)

    def nbytes(self, geometry: KVGeometry, tokens: int) -> int:
        """Bytes for ``tokens`` rows: a page's means are as large as one token's key and value."""
        return -(-tokens // self.page) * geometry.token_bytes


class PageMeansStore:
    """The means, worked out anew for every page that an append touches, from the tokens that count by then.

    They are meant to be multiplied by the tokens of the page again, and some of these subtracted. That magnifies their
    rounding, so that float16 stands for bfloat16: as many bytes, an eighth of the error.

    Attributes:
        means: for each layer ``[pages, 2, kv_heads, head_dim]``, of keys and of values.
    """

    def __init__(self, pool: KeyPool, page: int) -> None:
        self.pool, self.page = pool, page
        dtype = torch.float32 if pool.geometry.dtype == torch.float32 else torch.float16
        self.largest = torch.finfo(dtype).max
        self.means = [
            torch.zeros(-(-keys.shape[0] // page), 2, *keys.shape[1:], dtype=dtype, device=keys.device)
            for keys in pool.keys
        ]

    @property
    def nbytes(self) -> int:
        return sum(means.nbytes for means in self.means)

    def append(self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor) -> None:
        pages = touched_pages(positions, self.page)
        tokens = pages[..., None] * self.page + torch.arange(self.page, device=positions.device)
        # Beyond the last token lies what was rejected, or another request's past.
        counted = (tokens <= positions[:, -1:, None])[..., None, None, None]
        places = self.pool.rows(slots, tokens.clamp(max=positions[:, -1:, None]))
        held = torch.stack([self.pool.keys[layer][places], self.pool.values[layer][places]], dim=3).float()
        mean = torch.where(counted, held, 0).sum(2) / counted.sum(2)
        entries = self.pool.rows(slots, pages * self.page) // self.page
        self.means[layer][entries] = mean.clamp(-self.largest, self.largest).to(self.means[layer].dtype)

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean keys and values ``[..., kv_heads, head_dim]`` of the pages that begin at pool rows ``[...]``."""
        means = self.means[layer][rows // self.page]
        return means[..., 0, :, :], means[..., 1, :, :]
