"""Attention of blocks of rows over vertical and slash lines of the causal attention matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from specattn.kernels.sparse_attention import trim
from specattn.selection.base import Selection

GROUP_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that are computed at once: bounds memory, whatever the length, and keeps a GPU busy."""


@dataclass(frozen=True)
class Lines:
    """Which keys a head's rows read, by position and by distance.

    A block of rows reads a slash line as the tile of as many keys that its rows have at that distance, as a kernel
    does: each row sees a little more than the line. A block also reads its own positions, so no row is left empty.

    Attributes:
        verticals: bool ``[heads, length]``, keys that every row reads.
        slashes: bool ``[heads, length]``, distances from a row; 0 is its own position.
    """

    verticals: Tensor
    slashes: Tensor

    def keys(self, first: Tensor, block: int) -> Tensor:
        """What the blocks of ``block`` rows from positions ``first`` ``[blocks]`` on read.

        Returns:
            bool ``[blocks, heads, length]``, up to the last row of each.
        """
        length = self.slashes.shape[-1]
        position = torch.arange(length, device=first.device)
        distance = first[:, None] - position
        nearer = pad(self.slashes.cumsum(-1, dtype=torch.int32), (1, 0))  # slashes below a distance
        # Of the block's rows, the first sees a key at `distance` and the last `block - 1` further away.
        tiles = nearer[:, (distance + block).clamp(0, length)] > nearer[:, distance.clamp(0, length)]
        own, past = distance <= 0, distance > -block
        return (tiles.transpose(0, 1) | self.verticals | own[:, None]) & past[:, None]

    def products(self, start: int, rows: int, block: int) -> Tensor:
        """Visible query-key products of ``rows`` rows from position ``start`` on: float64 ``[heads]``."""
        heads, length = self.slashes.shape
        position = torch.arange(length, device=self.slashes.device)
        total = torch.zeros(heads, dtype=torch.float64, device=position.device)
        for first in _blocks(start, rows, block, heads * block * length, position.device):
            end = (first + block).clamp(max=start + rows)[:, None]
            seeing = (end - torch.maximum(first[:, None], position)).clamp(min=0).float()
            total += (self.keys(first, block).float() @ seeing[..., None])[..., 0].sum(0, dtype=torch.float64)
        return total


def line_attention(
    query: Tensor, key: Tensor, value: Tensor, lines: Lines, *, start: int, scaling: float, block: int
) -> Tensor:
    """Causal softmax attention of rows over their heads' lines, renormalised over them.

    Args:
        query: ``[rows, heads, head_dim]`` of heads that share one KV head, rows at ``start``, ``start + 1``, ...
        key, value: ``[start + rows, head_dim]``, of that KV head.
        lines: of the same query heads.
        start: position of the first row.
        scaling: factor of the logits.
        block: rows that read the same keys; the last block may be shorter.

    Returns:
        ``[rows, heads, head_dim]``, in the query's dtype; computed in float32.
    """
    rows, heads, _ = query.shape
    firsts = _blocks(start, rows, block, heads * block * len(key), query.device)
    queries = pad(query, (0, 0, 0, 0, 0, -rows % block)).unflatten(0, (-1, block)).transpose(1, 2)
    within = torch.arange(block, device=query.device)[:, None]
    out = []
    for first, some in zip(firsts, queries.split([len(first) for first in firsts]), strict=True):
        reads = lines.keys(first, block)
        # What some head of the group reads is gathered once, [blocks, 1, n]; each head masks the rest.
        listed = trim(Selection.from_mask(reads.any(1, keepdim=True))).indices
        tokens = listed.clamp(min=0).long()
        chosen = reads.gather(2, tokens.expand(-1, heads, -1)) & (listed >= 0)
        seen = tokens <= first[:, None, None] + within
        keys, values = (side[tokens].float().expand(-1, heads, -1, -1) for side in (key, value))
        mask = chosen[:, :, None] & seen[:, None]
        out.append(scaled_dot_product_attention(some.float(), keys, values, attn_mask=mask, scale=scaling))
    joined = torch.cat(out).transpose(1, 2)  # [blocks, block, heads, head_dim]
    return joined.flatten(0, 1)[:rows].to(query.dtype)


def _blocks(start: int, rows: int, block: int, logits: int, device: torch.device) -> tuple[Tensor, ...]:
    """Positions of the blocks' first rows, in groups whose memory is bounded; a block has at most ``logits``."""
    first = torch.arange(start, start + rows, block, device=device)
    limit = GROUP_LOGITS.get(device.type, GROUP_LOGITS["cpu"])
    return first.split(max(1, limit // logits))
