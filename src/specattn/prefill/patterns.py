"""Where the sparse patterns of some heads lie, what they compute and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specattn.kernels.blocks import BlockGrid, BlockLists
from specattn.kernels.line_attention import Lines, line_attention
from specattn.prefill.base import PrefillCall
from specattn.prefill.block_attention import block_sparse_attention


class Pattern(Protocol):
    """The patterns of some query heads in a call; any number of a KV head's query heads may be among them."""

    def attention(self, call: PrefillCall, heads: Sequence[int]) -> Tensor:
        """Attention of the call's ``heads``, whose patterns these are: ``[rows, heads, head_dim]``."""
        ...

    def products(self, call: PrefillCall) -> Tensor:
        """Visible query-key products that it computes: float64 ``[heads]``."""
        ...


@dataclass(frozen=True)
class LinePattern:
    """Vertical and slash lines, read by blocks of ``block`` rows."""

    lines: Lines
    block: int

    def attention(self, call: PrefillCall, heads: Sequence[int]) -> Tensor:
        query = call.query[:, heads]
        out = torch.empty_like(query)
        for kv, members in _by_kv_head(call, heads):
            lines = Lines(self.lines.verticals[members], self.lines.slashes[members])
            out[:, members] = line_attention(
                query[:, members],
                call.key[:, kv],
                call.value[:, kv],
                lines,
                start=call.start,
                scaling=call.scaling,
                block=self.block,
            )
        return out

    def products(self, call: PrefillCall) -> Tensor:
        return self.lines.products(call.start, len(call.query), self.block)


@dataclass(frozen=True)
class BlockPattern:
    """Whole blocks of keys.

    Attributes:
        grid: how the call is cut into blocks.
        mask: bool ``[heads, query_blocks, key_blocks]``.
    """

    grid: BlockGrid
    mask: Tensor

    @classmethod
    def of(cls, grid: BlockGrid, chosen: Tensor) -> BlockPattern:
        """The ``chosen`` blocks without the future, and those in which the rows themselves lie."""
        device = chosen.device
        visible = torch.arange(grid.key_blocks, device=device) < grid.visible(device)[:, None]
        return cls(grid, (chosen & visible) | grid.diagonal(device))

    def attention(self, call: PrefillCall, heads: Sequence[int]) -> Tensor:
        query = call.query[:, heads]
        out = torch.empty_like(query)
        for kv, members in _by_kv_head(call, heads):
            lists = BlockLists.from_mask(self.mask[None, members], self.grid.query_block, self.grid.key_block)
            key, value = (side[None, :, kv : kv + 1].transpose(1, 2) for side in (call.key, call.value))
            rows = query[None, :, members].transpose(1, 2)
            some, _ = block_sparse_attention(
                rows,
                key,
                value,
                lists,
                start=call.start,
                scaling=call.scaling,
                row_group=self.grid.query_block,
            )
            out[:, members] = some[0].transpose(0, 1)
        return out

    def products(self, call: PrefillCall) -> Tensor:
        return (self.mask * self.grid.products(self.mask.device)).sum((1, 2))


def kv_heads(call: PrefillCall) -> Tensor:
    """The KV head of each query head, int64 ``[query_heads]``."""
    heads = call.query.shape[1]
    return torch.arange(heads, device=call.query.device) // (heads // call.key.shape[1])


def block_grid(call: PrefillCall, block: int) -> BlockGrid:
    """The call cut into blocks of ``block`` rows and ``block`` keys."""
    return BlockGrid(len(call.query), len(call.key), call.start, block, block)


def causal_products(start: int, rows: int) -> int:
    """Query-key products of one head's dense causal attention, of ``rows`` rows behind ``start`` tokens."""
    return rows * start + rows * (rows + 1) // 2


def computed_share(call: PrefillCall, products: Tensor) -> Tensor:
    """``products`` of all heads together, over those of dense attention."""
    rows, heads, _ = call.query.shape
    return products / (heads * causal_products(call.start, rows))


def _by_kv_head(call: PrefillCall, heads: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Each KV head that serves some of ``heads``, and which of them, by their place in the list."""
    group = call.query.shape[1] // call.key.shape[1]
    for kv in range(call.key.shape[1]):
        members = [place for place, head in enumerate(heads) if head // group == kv]
        if members:
            yield kv, members
