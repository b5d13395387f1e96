"""Rows and keys in blocks: how tokens are cut, which pairs of blocks see each other, and lists of key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.selection.base import Selection


def in_blocks(tokens: Tensor, size: int) -> Tensor:
    """``[..., n, d]`` as ``[..., blocks, size, d]``; the last block is filled up with zeros."""
    missing = -tokens.shape[-2] % size
    padded = pad(tokens, (0, 0, 0, missing)) if missing else tokens
    return padded.unflatten(-2, (-1, size))


@dataclass(frozen=True)
class BlockGrid:
    """A stretch of query rows over keys, both cut into blocks.

    Attributes:
        rows, length: how many queries and keys there are.
        start: position of the first row among the keys; ``None`` if every row sees every key.
        query_block, key_block: rows and keys a block. Query blocks count from the first row of the stretch, key
            blocks from the first key.
    """

    rows: int
    length: int
    start: int | None
    query_block: int = 128
    key_block: int = 64

    @property
    def query_blocks(self) -> int:
        return -(-self.rows // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.length // self.key_block)

    @property
    def total(self) -> int:
        """Pairs of a row and a key that it sees."""
        if self.start is None:
            return self.rows * self.length
        return self.rows * self.start + self.rows * (self.rows + 1) // 2

    def visible(self, device: torch.device) -> Tensor:
        """Key blocks, from the first on, of which a query block sees something: int64 ``[query_blocks]``."""
        if self.start is None:
            return torch.full((self.query_blocks,), self.key_blocks, device=device)
        stop = (torch.arange(1, self.query_blocks + 1, device=device) * self.query_block).clamp(max=self.rows)
        return (self.start + stop - 1) // self.key_block + 1

    def diagonal(self, device: torch.device) -> Tensor:
        """Pairs of blocks in which some row sees only a part of the keys: bool ``[query_blocks, key_blocks]``."""
        if self.start is None:
            return torch.zeros(self.query_blocks, self.key_blocks, dtype=torch.bool, device=device)
        block = torch.arange(self.key_blocks, device=device)
        first = (
            self.start + torch.arange(self.query_blocks, device=device) * self.query_block
        ) // self.key_block
        return (block >= first[:, None]) & (block < self.visible(device)[:, None])

    def products(self, device: torch.device) -> Tensor:
        """Visible pairs of a row and a key in each pair of blocks: float64 ``[query_blocks, key_blocks]``."""
        first = torch.arange(self.query_blocks, device=device)[:, None] * self.query_block
        rows = (self.rows - first).clamp(max=self.query_block)
        key = torch.arange(self.key_blocks, device=device) * self.key_block
        if self.start is None:
            return (rows * (self.length - key).clamp(max=self.key_block)).double()
        # Row r of a block sees 0, 1, ... of a key block's tokens, then all of them: a ramp, summed in closed form.
        before = self.start + first - key
        return (self._ramp(before + rows) - self._ramp(before)).double()

    def _ramp(self, count: Tensor) -> Tensor:
        """The sum of ``min(t, key_block)`` over ``t`` from 1 to ``count``."""
        inside = count.clamp(0, self.key_block)
        return inside * (inside + 1) // 2 + (count - self.key_block).clamp(min=0) * self.key_block


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query block reads, for each query head.

    Attributes:
        indices: int32 ``[batch, query_heads, query_blocks, capacity]``, ascending key block numbers, the tail padded
            with -1.
        counts: int32 ``[batch, query_heads, query_blocks]``, how many entries of ``indices`` are valid; on the device.
        query_block, key_block: rows and keys a block.
    """

    indices: Tensor
    counts: Tensor
    query_block: int = 128
    key_block: int = 64

    @classmethod
    def from_mask(cls, mask: Tensor, query_block: int = 128, key_block: int = 64) -> BlockLists:
        """The lists that a boolean mask ``[batch, query_heads, query_blocks, key_blocks]`` describes."""
        chosen = Selection.from_mask(mask)
        return cls(chosen.indices, chosen.counts, query_block, key_block)
