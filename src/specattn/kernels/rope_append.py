"""Rotary embedding of a step's queries and keys, and its keys and values into their pool rows, in one launch.

Reads the merged q/k/v product where it lies, and writes each number once: queries to a tensor of their own, keys and
values to the paged pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys_reference


def rope_append(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    copy: QuantisedKeys | None = None,
) -> Tensor:
    """Rotate, and write keys and values to the pool.

    Args:
        qkv: ``[tokens, (query_heads + 2 * kv_heads) * head_dim]``.
        cosine, sine: float32 ``[positions, head_dim]`` tables.
        positions: int64 ``[tokens]``.
        rows: int64 ``[tokens]``, pool rows.
        keys, values: the pool of this layer, ``[pool rows, kv_heads, head_dim]``; written in place.
        norms: weights ``[head_dim]`` of the queries' and keys' RMS norms and their epsilon (Qwen3), if any.
        copy: this layer's quantised keys, if there are to be any; the new ones are written there as well.

    Returns:
        queries ``[tokens, query_heads, head_dim]``.
    """
    _, kv_heads, head_dim = keys.shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    query_heads = heads.shape[1] - 2 * kv_heads
    query, key, value = heads.split([query_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query, key = _normed(query, norms[0], norms[2]), _normed(key, norms[1], norms[2])
    # The tables are rounded first, as transformers rounds them.
    cos, sin = (table[positions].to(qkv.dtype)[:, None] for table in (cosine, sine))
    keys[rows] = _rotated(key, cos, sin)
    values[rows] = value
    if copy is not None:
        quantise_keys_reference(keys, rows, copy)
    return _rotated(query, cos, sin)


def _normed(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = heads.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(heads.dtype)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin
