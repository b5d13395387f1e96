"""Attention between mean-pooled blocks of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specattn.kernels.blocks import BlockGrid, in_blocks
from specattn.prefill.base import PrefillCall
from specattn.prefill.patterns import kv_heads


def block_means(tokens: Tensor, block: int) -> Tensor:
    """Means of ``[n, heads, head_dim]`` by blocks, the last perhaps shorter: float32 ``[heads, blocks, head_dim]``."""
    sums = in_blocks(tokens.float().transpose(0, 1), block).sum(-2)
    counts = in_blocks(tokens.new_ones(len(tokens), 1, dtype=torch.float32), block).sum(-2)
    return sums / counts


def pooled_attention(call: PrefillCall, heads: Sequence[int], grid: BlockGrid) -> Tensor:
    """Causal attention of some query heads between mean-pooled blocks.

    A query block sees the key blocks of which one of its rows sees something.

    Returns:
        float32 ``[query blocks, heads, key blocks]``, rows that sum to 1.
    """
    queries = block_means(call.query[:, heads], grid.query_block)
    keys = block_means(call.key, grid.key_block)[kv_heads(call)[heads]]
    logits = (queries @ keys.mT).transpose(0, 1) * call.scaling
    block = torch.arange(grid.key_blocks, device=keys.device)
    future = block >= grid.visible(keys.device)[:, None]
    return logits.masked_fill(future[:, None], float("-inf")).softmax(-1)
