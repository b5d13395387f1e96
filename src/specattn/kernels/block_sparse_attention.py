"""Attention of blocks of rows over lists of key blocks, with the values of negligible blocks left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.kernels.blocks import BlockLists, in_blocks

ROW_GROUP = 32
"""Rows that decide together whether a block's values are needed: those of a warp."""

GROUP_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Memory for what is computed at once: what a processor's caches like, what keeps a GPU busy."""


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockLists,
    *,
    start: int | None,
    scaling: float,
    scales: tuple[Tensor, Tensor] | None = None,
    lam: Tensor | None = None,
    row_group: int = ROW_GROUP,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over the key blocks in its list, renormalised over them.

    The blocks of a list are taken in order, as an online softmax does. Let m be a row's largest logit so far, the
    present block included, and m_local its largest logit in this block. Where ``m_local - m < -lam`` in every row of
    a group, the block still counts in the softmax's denominator, but its product with the values is skipped: its
    weights are below ``exp(-lam)`` of the largest. Rows that see nothing of the block do not object.

    Args:
        query: ``[batch, query_heads, rows, head_dim]``.
        key, value: ``[batch, kv_heads, length, head_dim]``, ``kv_heads`` dividing ``query_heads``.
        blocks: the lists. Query block i has the rows from ``i * query_block`` on, key block j the keys from
            ``j * key_block`` on; the last ones may be shorter. What is in no list is not read.
        start: row r sees the keys up to ``start + r``; ``None``: every row sees every key.
        scaling: factor of the logits.
        scales: if ``query`` and ``key`` are int8, their factors, float32 ``[batch, query_heads, query_blocks]`` and
            ``[batch, kv_heads, key_blocks]``.
        lam: float32 ``[query_heads]``, above 0, in nats; ``None`` or infinity skips nothing.
        row_group: rows of a group; divides ``query_block``.

    Returns:
        ``[batch, query_heads, rows, head_dim]`` in the value's dtype, computed in float32, zeros in rows that see
        nothing; and int32 ``[batch, query_heads, query_blocks]``, the visible query-key products whose values were
        skipped.
    """
    batch, query_heads, rows, head_dim = query.shape
    tiles = _Tiles.of(query, key, value, blocks, start, scaling, scales, lam, row_group)
    out = value.new_zeros(len(tiles.queries), blocks.query_block, head_dim)
    skipped = torch.zeros(len(tiles.queries), dtype=torch.int32, device=query.device)
    for chosen, width in tiles.groups(blocks.counts.flatten()):
        some, count = tiles.attend(chosen, width)
        out[chosen], skipped[chosen] = some.to(out.dtype), count.int()
    out = out.view(batch, query_heads, -1, head_dim)[:, :, :rows]
    return out, skipped.view(blocks.counts.shape)


@dataclass(frozen=True)
class _Tiles:
    """Every query block of every head and request as one *tile*, with what it attends to.

    Attributes:
        queries: ``[tiles, query_block, head_dim]``.
        keys, values: ``[blocks of all KV heads and requests, key_block, head_dim]``.
        indices: int32 ``[tiles, capacity]``.
        key_offset: int64 ``[tiles]``, where the blocks of the tile's KV head begin in ``keys``.
        first_row: int64 ``[tiles]``.
        query_factor, key_factor: what to multiply logits by, ``[tiles]`` and ``[blocks]``.
        lam: ``[tiles]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor
    key_offset: Tensor
    first_row: Tensor
    query_factor: Tensor
    key_factor: Tensor
    lam: Tensor
    rows: int
    length: int
    start: int | None
    row_group: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: BlockLists,
        start: int | None,
        scaling: float,
        scales: tuple[Tensor, Tensor] | None,
        lam: Tensor | None,
        row_group: int,
    ) -> _Tiles:
        batch, query_heads, query_blocks, _ = blocks.indices.shape
        kv_heads, device = key.shape[1], query.device
        keys, values = in_blocks(key, blocks.key_block), in_blocks(value, blocks.key_block)
        shape, key_blocks = blocks.counts.shape, keys.shape[2]
        heads = torch.arange(batch * kv_heads, device=device).view(batch, kv_heads, 1, 1)
        offset = (heads * key_blocks).expand(-1, -1, query_heads // kv_heads, query_blocks)
        first_row = (torch.arange(query_blocks, device=device) * blocks.query_block).expand(shape)
        query_scale, key_scale = scales or (
            torch.ones(shape, device=device),
            torch.ones(keys.shape[:3], device=device),
        )
        if lam is None:
            lam = torch.full((query_heads,), torch.inf, device=device)
        return cls(
            queries=in_blocks(query, blocks.query_block).flatten(0, 2),
            keys=keys.flatten(0, 2),
            values=values.flatten(0, 2),
            indices=blocks.indices.flatten(0, 2),
            key_offset=offset.flatten(),
            first_row=first_row.flatten(),
            query_factor=query_scale.flatten() * scaling,
            key_factor=key_scale.flatten(),
            lam=lam[:, None].expand(shape).flatten(),
            rows=query.shape[2],
            length=key.shape[2],
            start=start,
            row_group=row_group,
        )

    def groups(self, counts: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Tiles with lists of similar length, as many as fit in memory, and their longest list."""
        tile, head_dim = self.queries.shape[1:]
        bytes_a_block = 16 * self.keys.shape[1] * (tile + head_dim)
        order = counts.argsort(descending=True)
        budget = GROUP_BYTES.get(counts.device.type, GROUP_BYTES["cpu"])
        lengths, first = counts[order].tolist(), 0
        while first < len(lengths) and lengths[first] > 0:
            size = max(1, budget // (lengths[first] * bytes_a_block))
            yield order[first : first + size], lengths[first]
            first += size

    def attend(self, tiles: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Output ``[tiles, query_block, head_dim]`` and skipped products ``[tiles]`` of some tiles."""
        listed = self.indices[tiles, :width].long()
        blocks = self.key_offset[tiles][:, None] + listed.clamp(min=0)
        visible = self._visible(tiles, listed)
        logits = self._logits(tiles, blocks).masked_fill_(~visible, -torch.inf)
        local = logits.amax(-1)
        largest = local.cummax(-1).values
        skip = self._skip(tiles, local, largest)
        top = largest[..., -1, None, None].clamp(min=torch.finfo(torch.float32).min)
        weights = (logits - top).exp_()
        total = weights.sum((-1, -2)).clamp(min=torch.finfo(torch.float32).tiny)
        weights.masked_fill_(skip[..., None], 0)
        out = weights.flatten(2) @ self.values[blocks].float().flatten(1, 2)
        return out / total[..., None], (visible & skip[..., None]).sum((1, 2, 3))

    def _visible(self, tiles: Tensor, listed: Tensor) -> Tensor:
        """bool ``[tiles, query_block, width, key_block]``."""
        row = self.first_row[tiles][:, None] + torch.arange(self.queries.shape[1], device=tiles.device)
        row = row[..., None, None]
        size = self.keys.shape[1]
        token = (listed[..., None] * size + torch.arange(size, device=tiles.device))[:, None]
        seen = (token >= 0) & (token < self.length) & (row < self.rows)
        return seen if self.start is None else seen & (token <= self.start + row)

    def _logits(self, tiles: Tensor, blocks: Tensor) -> Tensor:
        """float32 ``[tiles, query_block, width, key_block]``. Integers are multiplied exactly: they are small."""
        logits = self.queries[tiles].float() @ self.keys[blocks].float().flatten(1, 2).mT
        factors = self.query_factor[tiles][:, None] * self.key_factor[blocks]
        return logits.unflatten(-1, blocks.shape[1:] + self.keys.shape[1:2]) * factors[:, None, :, None]

    def _skip(self, tiles: Tensor, local: Tensor, largest: Tensor) -> Tensor:
        """bool ``[tiles, query_block, width]``: no row of the group comes within lam of its largest logit so far."""
        below = torch.where(local.isneginf(), -torch.inf, local - largest)
        nearest = below.unflatten(1, (-1, self.row_group)).amax(2)
        skip = nearest < -self.lam[tiles][:, None, None]
        return skip.repeat_interleave(self.row_group, 1)
