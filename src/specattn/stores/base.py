"""The contract between a side store, the pool of keys that it follows, and the method that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.geometry import KVGeometry

DEFAULT_PAGE = 16
"""Tokens a page of the pool, unless a store needs larger ones."""

LARGEST_PAGE = 4096


class KeyPool(Protocol):
    """Keys of many requests in rows; :class:`specattn.cache.PagedKVCache` is one."""

    @property
    def geometry(self) -> KVGeometry: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def keys(self) -> Sequence[Tensor]:
        """For each layer ``[pool rows, kv_heads, head_dim]``."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """Of the same shapes."""
        ...

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Pool rows, int64, of token ``positions`` ``[batch, ...]`` of ``slots`` ``[batch]``."""
        ...


class SideStore(Protocol):
    """Something derived from the keys of a pool.

    What belongs to a token lies at its pool row, what belongs to a stretch of ``page`` tokens at the pool row of the
    first of them divided by ``page``; the stretch lies within one page of the pool. How it is read is each store's own.
    """

    @property
    def nbytes(self) -> int: ...

    def append(self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor) -> None:
        """The pool has just taken ``keys`` ``[batch, kv_heads, n, head_dim]`` in at ``rows`` ``[batch, n]``.

        Nothing tells a store of rejected tokens: what is read after them must not depend on them. A store whose
        entries belong to one token has nothing to do, since they are written again before they count; one that
        summarises pages works the touched pages out anew from the pool.

        Args:
            positions: ``[batch, n]``, ascending and without gaps; the last one ends what the request holds.
        """
        ...


class StoreSpec(Protocol):
    """What a method asks for: a frozen dataclass, so that two methods that ask for the same share one store."""

    @property
    def page(self) -> int:
        """Tokens that an entry stands for: a power of two, 1 for entries of single tokens."""
        ...

    def build(self, pool: KeyPool) -> SideStore:
        """An empty store for ``pool``."""
        ...

    def nbytes(self, geometry: KVGeometry, tokens: int) -> int:
        """Bytes that the store takes for a pool of ``tokens`` rows, in all layers."""
        ...


def touched_pages(positions: Tensor, page: int) -> Tensor:
    """Numbers of the pages of ``page`` tokens that ``positions`` ``[batch, n]``, without gaps, lie in.

    Returns:
        ``[batch, pages]``; as many as ``n`` tokens can touch at most, the last one repeated where they touch fewer.
    """
    count = (positions.shape[1] + page - 2) // page + 1
    pages = positions[:, :1] // page + torch.arange(count, device=positions.device)
    return torch.minimum(pages, positions[:, -1:] // page)


def pool_page(specs: Sequence[StoreSpec]) -> int:
    """Tokens a page of the pool that suits all of ``specs``.

    Raises:
        UsageError: if a store's page is not a power of two, or too large.
    """
    for spec in specs:
        if not 1 <= spec.page <= LARGEST_PAGE or spec.page & (spec.page - 1):
            raise UsageError(
                f"page={spec.page} is no power of two up to {LARGEST_PAGE}; use for example page=16"
            )
    return max([DEFAULT_PAGE, *(spec.page for spec in specs)])
