"""A batch of requests in a scattered pool where everything that must not be read is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specattn.kernels.sparse_attention import sparse_attention
from specattn.selection.base import Selection

SCALING = 0.21
NAN = float("nan")


@dataclass(frozen=True)
class PagedCase:
    """Arguments of the paged kernels; the clean keys and values are ``[batch, kv_heads, length, head_dim]``."""

    query: Tensor
    keys: Tensor
    values: Tensor
    block_table: Tensor
    slots: Tensor
    selection: Selection
    lengths: Tensor
    positions: Tensor
    page_size: int
    clean_keys: Tensor
    clean_values: Tensor

    def expected(self) -> Tensor:
        """What the float32 reference makes of the tokens that were selected, float32."""
        columns = (
            self.selection.indices.clamp(min=0).long()[..., None].expand(-1, -1, -1, self.query.shape[-1])
        )
        keys, values = self.clean_keys.gather(2, columns), self.clean_values.gather(2, columns)
        return sparse_attention(self.query.float(), keys, values, self.selection, self.positions, SCALING)

    def poisoned_out(self) -> Tensor:
        return torch.full(self.query.shape, NAN, dtype=self.query.dtype, device=self.query.device)

    def to(self, device: str) -> PagedCase:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        parts = {
            name: value.to(device)
            for name, value in vars(self.selection).items()
            if isinstance(value, Tensor)
        }
        return replace(self, selection=replace(self.selection, **parts), **moved)


def paged_case(
    lengths: list[int],
    *,
    rows: int = 2,
    query_heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    page_size: int = 16,
    density: float = 0.5,
    weighted: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedCase:
    """Requests of ``lengths`` tokens, the last ``rows`` of them this round's; a length of 0 is padding of the batch.

    A list holds about ``density`` of its request's tokens, the round's own among them; at density 1 all.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    token = torch.arange(longest)
    ends = torch.tensor(lengths)
    chosen = torch.rand(batch, kv_heads, longest, generator=generator) < density
    mask = (chosen | (token >= ends[:, None, None] - rows)) & (token < ends[:, None, None])
    clean_keys, clean_values = normal(2, batch, kv_heads, longest, head_dim)
    width = -(-longest // page_size) + 3
    slots, block_table = _scattered_pages(lengths, width, page_size, generator)
    pool = [
        torch.full((int(block_table.max() + 2) * page_size, kv_heads, head_dim), NAN, dtype=dtype)
        for _ in "kv"
    ]
    pool_rows = block_table[slots].long()[:, token // page_size] * page_size + token % page_size
    for request in range(batch):
        for head in range(kv_heads):
            read = mask[request, head]
            pool[0][pool_rows[request, read], head] = clean_keys[request, head, read]
            pool[1][pool_rows[request, read], head] = clean_values[request, head, read]
    selection = Selection.from_mask(mask)
    if weighted:
        weights = torch.randn(selection.indices.shape, generator=generator)
        selection = replace(selection, log_weights=weights.masked_fill(selection.indices < 0, NAN))
    return PagedCase(
        query=normal(batch, rows, query_heads, head_dim),
        keys=pool[0],
        values=pool[1],
        block_table=block_table,
        slots=slots,
        selection=selection,
        lengths=ends.int(),
        positions=(ends[:, None] - rows + torch.arange(rows)).clamp(min=0),
        page_size=page_size,
        clean_keys=clean_keys.float(),
        clean_values=clean_values.float(),
    )


def _scattered_pages(
    lengths: list[int], width: int, page_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Slots in no order and their block table; a request's pages lie anywhere, page 0 is nobody's."""
    needed = [-(-length // page_size) for length in lengths]
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    pages = torch.randperm(sum(needed), generator=generator).int() + 1
    table = torch.zeros(len(lengths) + 2, width, dtype=torch.int32)
    for slot, own in zip(slots.tolist(), pages.split(needed), strict=True):
        table[slot, : len(own)] = own
    return slots, table
