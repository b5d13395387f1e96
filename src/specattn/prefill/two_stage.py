"""Both stages of SpargeAttn: choose key blocks, then attend to them and skip the values that do not matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.blocks import BlockGrid, BlockLists
from specattn.kernels.int8_blocks import quantise_blocks, smooth_keys
from specattn.prefill.block_attention import block_sparse_attention
from specattn.prefill.block_compression import Compressed, compress
from specattn.prefill.block_selection import select_blocks
from specattn.prefill.thresholds import Thresholds

QUERY_BLOCK, KEY_BLOCK = 128, 64
LARGEST_HEAD_DIM = 256
STRETCH = 64 * QUERY_BLOCK
"""Rows whose blocks are chosen at once: what bounds the memory of long calls."""


@dataclass(frozen=True)
class TwoStageOutput:
    """Attention, and what it cost.

    Attributes:
        out: ``[batch, query_heads, rows, head_dim]``.
        computed: share of the visible query-key products that were computed, float64 ``[batch, query_heads]``.
        skipped: share of them that were computed, but whose values were skipped.
    """

    out: Tensor
    computed: Tensor
    skipped: Tensor

    @property
    def sparsity(self) -> Tensor:
        """Share of both matrix products, queries with keys and weights with values, that was left out."""
        return 1 - self.computed + self.skipped / 2


def two_stage_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Thresholds,
    *,
    start: int | None,
    scaling: float,
    int8: bool,
) -> TwoStageOutput:
    """SpargeAttn (arXiv 2502.18137, algorithm 1).

    Args:
        query: ``[batch, query_heads, rows, head_dim]``.
        key, value: ``[batch, kv_heads, length, head_dim]``.
        start: row r sees the keys up to ``start + r``; ``None``: every row sees every key.
        scaling: factor of the logits.
        int8: multiply queries and smoothed keys as eight-bit integers; blocks are chosen in full precision.

    Returns:
        The output, in the value's dtype.
    """
    keys = _Keys.of(key, int8)
    parts = [
        _attend(part, keys, value, thresholds, None if start is None else start + first, scaling)
        for first, part in zip(range(0, query.shape[2], STRETCH), query.split(STRETCH, 2), strict=True)
    ]
    out, computed, skipped = zip(*parts, strict=True)
    total = BlockGrid(query.shape[2], key.shape[2], start).total
    return TwoStageOutput(torch.cat(out, 2), sum(computed) / total, sum(skipped) / total)


@dataclass(frozen=True)
class _Keys:
    """Keys as both stages want them: compressed for the first; as integers, if so wished, for the second."""

    compressed: Compressed
    operand: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, key: Tensor, int8: bool) -> _Keys:
        operand, scales = quantise_blocks(smooth_keys(key), KEY_BLOCK) if int8 else (key, None)
        return cls(compress(key, KEY_BLOCK), operand, scales)


def _attend(
    query: Tensor, keys: _Keys, value: Tensor, thresholds: Thresholds, start: int | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, computed and skipped products of a stretch of rows."""
    grid = BlockGrid(query.shape[2], value.shape[2], start, QUERY_BLOCK, KEY_BLOCK)
    mask = select_blocks(compress(query, QUERY_BLOCK), keys.compressed, grid, thresholds, scaling)
    scales = None
    if keys.scales is not None:
        query, query_scales = quantise_blocks(query, QUERY_BLOCK)
        scales = (query_scales, keys.scales)
    lists = BlockLists.from_mask(mask, QUERY_BLOCK, KEY_BLOCK)
    out, skipped = block_sparse_attention(
        query, keys.operand, value, lists, start=start, scaling=scaling, scales=scales, lam=thresholds.lam
    )
    computed = torch.einsum("bhqk,qk->bh", mask.double(), grid.products(mask.device))
    return out, computed, skipped.sum(-1, dtype=torch.float64)


def check_head_dim(name: str, head_dim: int) -> None:
    """Refuse a head size that the matrix units have no tiles for.

    Raises:
        UsageError: naming the size.
    """
    if head_dim % 8 or not 16 <= head_dim <= LARGEST_HEAD_DIM:
        raise UsageError(
            f"{name}: head_dim={head_dim} is not supported; it must be a multiple of 8 from 16 to "
            f"{LARGEST_HEAD_DIM}; use dense attention here"
        )
