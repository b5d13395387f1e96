"""The attention that cached tokens receive from many rows: the column sums of the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.dense_attention import Segments, attention_probabilities

BLOCK = 1 << 25
"""Probabilities that are held at once, so that long prompts need no more memory than short ones."""


def received_attention(query: Tensor, segments: Segments, start: int, scaling: float) -> Tensor:
    """What each token gets from the rows at positions ``start``, ``start + 1``, ... together.

    Args:
        query: ``[rows, query_heads, head_dim]``.
        segments: keys and values from position 0 to the last row's own; the values are not read.
        scaling: factor of the logits.

    Returns:
        float32 ``[query_heads, length]``.
    """
    keys = [(key.float(), value) for key, value in segments]
    rows, query_heads, _ = query.shape
    total = torch.zeros(query_heads, sum(key.shape[0] for key, _ in keys), device=query.device)
    block = max(1, BLOCK // total.numel())
    for first in range(0, rows, block):
        part = query[first : first + block]
        total += attention_probabilities(part, keys, start + first, 0, scaling).sum(1)
    return total
