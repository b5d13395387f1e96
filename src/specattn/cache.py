"""The paged KV cache: a pool of pages, a block table a request, append and rollback.

A *slot* is the place of one request; a *row* is one token's place in the pool. Page 0 belongs to nobody: it takes
the writes of padding, so that a batch of fixed shape needs no branches.

Positions here are places in the cache. They are the tokens' positions in the text until tokens are evicted; from then
on a new token lies as many places before its position as were evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import CacheFullError, UsageError
from specattn.geometry import KVGeometry
from specattn.memory import available_bytes, human_bytes
from specattn.stores.base import SideStore, StoreSpec, pool_page

Segment = tuple[Tensor, Tensor]
"""Keys and values ``[length, kv_heads, head_dim]`` of tokens that lie side by side in the pool."""


@dataclass
class _Allocation:
    pages: list[int]
    runs: list[tuple[int, int]]
    """First row and number of rows of each stretch of neighbouring pages."""
    reserved: int
    """Tokens of the longest text that the request may come to."""
    length: int = 0
    evicted: int = 0


class PagedKVCache:
    """Keys and values of many requests in one pool.

    Args:
        geometry: the model's attention shapes.
        tokens: how many tokens the pool must hold, all requests together; rounded up to pages.
        slots: how many requests it can hold at once.
        max_length: longest request; the width of the block tables.
        stores: what is to be kept beside the keys, see :mod:`specattn.stores`.
        page_size: tokens a page; what suits ``stores`` if ``None``.

    Attributes:
        key_pool, value_pool: ``[layers, rows, kv_heads, head_dim]``.
        keys, values: views of them, for each layer ``[rows, kv_heads, head_dim]``.
        block_table: int32 ``[slots + 1, pages_a_request]``, unused entries are 0.
        spare_slot: the last row of the table, which no request ever has: where padding of a batch reads and writes.
        stores: the side stores by what asked for them.
        text: int32 ``[slots + 1, length]``: the tokens that were fed, at their positions in the text. What lies behind
            a request's own is of nobody.

    Raises:
        CacheFullError: if the pool does not fit in the memory that is free.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        tokens: int,
        slots: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        stores: Sequence[StoreSpec] = (),
        page_size: int | None = None,
    ) -> None:
        page_size = pool_page(stores) if page_size is None else page_size
        if tokens < 1 or slots < 1 or page_size < 1:
            raise UsageError(
                f"a cache needs at least one token, slot and row a page: {tokens=}, {slots=}, {page_size=}"
            )
        self.geometry = geometry
        self.page_size = page_size
        self.device = torch.device(device)
        # One page of slack a slot: every request may leave its last page partly empty.
        pages = 1 + self.pages_for(tokens) + slots
        rows = pages * page_size
        needed = rows * geometry.token_bytes + sum(spec.nbytes(geometry, rows) for spec in stores)
        check_memory(needed, self.device, f"a KV cache of {tokens:,} tokens")
        # In one tensor, so that a kernel can go through all layers.
        shape = (geometry.layers, rows, geometry.kv_heads, geometry.head_dim)
        self.key_pool = torch.empty(shape, dtype=geometry.dtype, device=device)
        self.value_pool = torch.empty(shape, dtype=geometry.dtype, device=device)
        self.keys: Sequence[Tensor] = list(self.key_pool)
        self.values: Sequence[Tensor] = list(self.value_pool)
        width = self.pages_for(max_length or tokens)
        self.spare_slot = slots
        self.block_table = torch.zeros(slots + 1, width, dtype=torch.int32, device=device)
        self.text = torch.zeros(slots + 1, width * page_size, dtype=torch.int32, device=device)
        self.stores: dict[StoreSpec, SideStore] = {spec: spec.build(self) for spec in stores}
        self._free_pages = set(range(1, pages))
        self._allocations: list[_Allocation | None] = [None] * slots

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens occupy."""
        return -(-tokens // self.page_size)

    # Requests

    def fits(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` tokens could be admitted now."""
        return None in self._allocations and self.pages_for(tokens) <= len(self._free_pages)

    def could_fit(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` tokens could be admitted into the empty cache."""
        pages = self.pages_for(tokens)
        return pages <= self.block_table.shape[1] and pages * self.page_size < self.keys[0].shape[0]

    def allocate(self, tokens: int) -> int:
        """Reserve room for a request of at most ``tokens`` tokens and return its slot.

        Raises:
            CacheFullError: if no slot or not enough pages are free.
        """
        needed = self.pages_for(tokens)
        if not self.fits(tokens) or needed > self.block_table.shape[1]:
            raise CacheFullError(
                f"a request of {tokens:,} tokens needs {needed:,} pages of {self.page_size}; "
                f"{len(self._free_pages):,} are free, a request may have {self.block_table.shape[1]:,}, and "
                f"{self._allocations.count(None)} slots are free. Wait for a request to finish, shorten it, "
                "or create a larger cache."
            )
        slot = self._allocations.index(None)
        pages = _take_pages(self._free_pages, needed)
        self._allocations[slot] = _Allocation(pages, _runs(pages, self.page_size), tokens)
        self.block_table[slot] = 0
        self.block_table[slot, :needed] = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self.set_length(slot, 0)
        return slot

    def free(self, slot: int) -> None:
        """Give the pages of ``slot`` back."""
        self._free_pages.update(self._allocation(slot).pages)
        self._allocations[slot] = None
        self.block_table[slot] = 0

    def length(self, slot: int) -> int:
        """Tokens of ``slot`` that count."""
        return self._allocation(slot).length

    def evicted(self, slot: int) -> int:
        """Tokens that every layer and head of ``slot`` has dropped for good."""
        return self._allocation(slot).evicted

    def position(self, slot: int) -> int:
        """The text position of the next token of ``slot``."""
        return self.length(slot) + self.evicted(slot)

    def capacity(self, slot: int) -> int:
        """Tokens for which ``slot`` has room."""
        return len(self._allocation(slot).pages) * self.page_size

    def set_length(self, slot: int, length: int) -> None:
        """Declare that ``slot`` holds ``length`` tokens: after an append, or to roll back rejected ones.

        Raises:
            UsageError: if ``length`` is negative or beyond the slot's room.
        """
        allocation = self._allocation(slot)
        room = len(allocation.pages) * self.page_size
        if not 0 <= length <= room:
            raise UsageError(f"slot {slot} has room for {room} tokens, not {length}")
        allocation.length = length

    def compact(self, slot: int, kept: Tensor) -> None:
        """Drop all tokens of ``slot`` but those at ``kept``, for good, and give the pages back that it has no use for.

        The kept ones move to the front, in their order. The slot keeps room for what it could still take before.

        Args:
            kept: int64 ``[layers, kv_heads, n]``, ascending cache positions; each head keeps its own ``n`` tokens.

        Raises:
            UsageError: if ``kept`` is of another shape, or longer than what the slot holds.
        """
        allocation, held = self._allocation(slot), self.length(slot)
        self.copy(slot, self, slot, kept)
        allocation.evicted += held - allocation.length
        needed = self.pages_for(max(allocation.length, allocation.reserved - allocation.evicted))
        self._free_pages.update(allocation.pages[needed:])
        self.block_table[slot, needed:] = 0
        del allocation.pages[needed:]
        allocation.runs = _runs(allocation.pages, self.page_size)

    def _allocation(self, slot: int) -> _Allocation:
        allocation = self._allocations[slot]
        if allocation is None:
            raise UsageError(f"slot {slot} of the KV cache holds no request")
        return allocation

    # Data

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Pool rows, int64, of token ``positions`` ``[batch, ...]`` of ``slots`` ``[batch]``."""
        flat = positions.long().flatten(1)
        page = self.block_table[slots[:, None], flat // self.page_size]
        return torch.add(flat % self.page_size, page, alpha=self.page_size).view(positions.shape)

    def append(
        self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Write ``keys`` and ``values`` ``[batch, kv_heads, tokens, head_dim]`` at pool ``rows`` ``[batch, tokens]``.

        ``rows`` is what :meth:`rows` gives for ``slots`` and ``positions``; it is the same for all layers.
        """
        flat = rows.flatten()
        self.keys[layer][flat] = keys.transpose(1, 2).flatten(0, 1)
        self.values[layer][flat] = values.transpose(1, 2).flatten(0, 1)
        for store in self.stores.values():
            store.append(layer, slots, positions, rows, keys)

    def note(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """``tokens`` ``[batch, n]`` are fed at text ``positions`` ``[batch, n]`` of ``slots``."""
        self.text[slots[:, None], positions] = tokens.to(self.text.dtype)

    def copy(self, slot: int, source: PagedKVCache, source_slot: int, tokens: Tensor) -> None:
        """Let ``slot`` hold tokens of another cache, or of this one, and nothing else; side stores follow.

        Args:
            tokens: int64 ``[layers, kv_heads, n]``, positions in ``source_slot`` for each head.

        Raises:
            UsageError: if ``tokens`` is of another shape, or longer than what the source holds.
        """
        layers, kv_heads, count = tokens.shape
        held = source.length(source_slot)
        if (layers, kv_heads) != (self.geometry.layers, self.geometry.kv_heads) or count > held:
            raise UsageError(
                f"a list of shape {list(tokens.shape)} does not fit {self.geometry.layers} layers, "
                f"{self.geometry.kv_heads} KV heads and the {held} tokens of slot {source_slot}"
            )
        width = min(self.text.shape[1], source.text.shape[1])
        self.text[slot, :width] = source.text[source_slot, :width]
        positions = torch.arange(count, device=self.device)[None]
        ids, source_ids = (torch.tensor([s], device=self.device) for s in (slot, source_slot))
        rows = self.rows(ids, positions)
        for layer in range(layers):
            keys, values = source.gather(layer, source_ids, tokens[layer][None])
            self.append(layer, ids, positions, rows, keys, values)
        self.set_length(slot, count)

    def segments(self, layer: int, slot: int, start: int, stop: int) -> list[Segment]:
        """Views of the tokens ``start`` to ``stop`` of ``slot``: nothing is copied."""
        result, first = [], 0
        for row, count in self._allocation(slot).runs:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                span = slice(row + low - first, row + high - first)
                result.append((self.keys[layer][span], self.values[layer][span]))
            first += count
        return result

    def gather(self, layer: int, slots: Tensor, indices: Tensor) -> Segment:
        """Keys and values ``[batch, kv_heads, capacity, head_dim]`` of the tokens ``indices`` (-1 reads token 0)."""
        rows = self.rows(slots, indices.clamp(min=0))
        heads = torch.arange(indices.shape[1], device=rows.device)[None, :, None]
        return self.keys[layer][rows, heads], self.values[layer][rows, heads]

    # Accounting

    @property
    def nbytes(self) -> int:
        """Bytes that the pool and its side stores occupy."""
        pool = self.key_pool.nbytes + self.value_pool.nbytes
        return pool + sum(store.nbytes for store in self.stores.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that belong to a request."""
        pages = sum(len(a.pages) for a in self._allocations if a is not None)
        return pages * self.page_size * self.geometry.token_bytes


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse ``what`` if it needs more than the memory that is free on ``device``.

    Raises:
        CacheFullError: naming both figures.
    """
    free = available_bytes(device)
    if needed > free:
        raise CacheFullError(
            f"{what} needs {human_bytes(needed)} and {human_bytes(free)} are free on {device}. "
            "Use a shorter context, fewer requests at once, or a smaller dtype."
        )


def _take_pages(free: set[int], count: int) -> list[int]:
    """Remove ``count`` pages from ``free``: neighbours if there is such a run, else the lowest."""
    ordered = sorted(free)
    pages = ordered[:count]
    for end in range(count, len(ordered) + 1):
        if ordered[end - 1] - ordered[end - count] == count - 1:
            pages = ordered[end - count : end]
            break
    free.difference_update(pages)
    return pages


def _runs(pages: Sequence[int], page_size: int) -> list[tuple[int, int]]:
    """Stretches of neighbouring ``pages`` as (first row, rows)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        row = page * page_size
        if runs and sum(runs[-1]) == row:
            runs[-1] = (runs[-1][0], runs[-1][1] + page_size)
        else:
            runs.append((row, page_size))
    return runs
