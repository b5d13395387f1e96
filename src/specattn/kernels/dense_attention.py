"""Causal attention of a few query rows over everything that a request has cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

Segments = Sequence[tuple[Tensor, Tensor]]
"""Keys and values ``[length, kv_heads, head_dim]`` in token order, split where the pool splits them."""


FEW_ROWS = 64
"""Decoding reads scattered pages where they lie; prefill, with more rows than this, joins them first."""


def dense_attention(
    query: Tensor, segments: Segments, start: int, first: int, scaling: float, window: int | None = None
) -> Tensor:
    """Attention of rows at positions ``start``, ``start + 1``, ... over cached tokens.

    Args:
        query: ``[rows, query_heads, head_dim]``.
        segments: the tokens from position ``first`` to the last row's own.
        start: position of the first row.
        first: position of the first token in ``segments``; above 0 where a sliding window cuts the rest off.
        scaling: factor of the logits.
        window: how many tokens, its own included, a row sees; all if ``None``.

    Returns:
        ``[rows, query_heads, head_dim]``, in the query's dtype.
    """
    rows, query_heads, _ = query.shape
    if len(segments) > 1 and rows <= FEW_ROWS:
        probabilities = attention_probabilities(query, segments, start, first, scaling, window)
        return weighted_values(probabilities, segments).to(query.dtype)
    key, value = (
        segments[0] if len(segments) == 1 else (torch.cat(part) for part in zip(*segments, strict=True))
    )
    length, kv_heads, _ = key.shape
    key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    if rows == length and (window is None or length <= window):
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    if query.is_cuda and rows > FEW_ROWS and window is None:
        # A prompt's later chunks: the same kernels as its first, which take no mask of this size.
        bias = causal_lower_right(rows, length)
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=bias, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    # The query heads of a group become rows of their KV head: each key is read once.
    mask = causal_mask(rows, length, start - first, query.device, window).repeat(query_heads // kv_heads, 1)
    folded = fold_group(query, kv_heads)[None]
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return unfold_group(out[0], rows)


def attention_probabilities(
    query: Tensor, segments: Segments, start: int, first: int, scaling: float, window: int | None = None
) -> Tensor:
    """The attention distributions themselves, float32 ``[query_heads, rows, length]``.

    Arguments as in :func:`dense_attention`; ``window`` limits each row to its last ``window`` tokens.
    """
    return attention_logits(query, segments, start, first, scaling, window).softmax(-1)


def attention_logits(
    query: Tensor, segments: Segments, start: int, first: int, scaling: float, window: int | None = None
) -> Tensor:
    """What :func:`attention_probabilities` is the softmax of; -inf where a row does not see a token."""
    rows, query_heads, _ = query.shape
    kv_heads = segments[0][0].shape[1]
    folded = fold_group(query, kv_heads).float() * scaling
    logits = torch.cat([folded @ key.permute(1, 2, 0).float() for key, _ in segments], dim=-1)
    mask = causal_mask(rows, logits.shape[-1], start - first, query.device, window)
    return logits.view(query_heads, rows, -1).masked_fill(~mask, float("-inf"))


def weighted_values(probabilities: Tensor, segments: Segments) -> Tensor:
    """Values weighted by ``probabilities`` ``[query_heads, rows, length]``: ``[rows, query_heads, head_dim]``."""
    query_heads, rows, _ = probabilities.shape
    kv_heads = segments[0][1].shape[1]
    folded = probabilities.view(kv_heads, (query_heads // kv_heads) * rows, -1)
    parts = folded.split([value.shape[0] for _, value in segments], dim=-1)
    out = sum(
        part @ value.transpose(0, 1).to(part.dtype) for part, (_, value) in zip(parts, segments, strict=True)
    )
    assert isinstance(out, Tensor)
    return unfold_group(out, rows)


def causal_mask(
    rows: int, length: int, start: int, device: torch.device, window: int | None = None
) -> Tensor:
    """Boolean ``[rows, length]``: row ``i`` sees tokens up to ``start + i``, the last ``window`` of them."""
    last = start + torch.arange(rows, device=device)[:, None]
    token = torch.arange(length, device=device)[None]
    visible = token <= last
    return visible if window is None else visible & (token > last - window)


def fold_group(query: Tensor, kv_heads: int) -> Tensor:
    """``[rows, query_heads, d]`` to ``[kv_heads, group * rows, d]``."""
    rows, query_heads, head_dim = query.shape
    return query.transpose(0, 1).reshape(kv_heads, (query_heads // kv_heads) * rows, head_dim)


def unfold_group(folded: Tensor, rows: int) -> Tensor:
    """``[kv_heads, group * rows, d]`` back to ``[rows, query_heads, d]``."""
    return folded.reshape(-1, rows, folded.shape[-1]).transpose(0, 1)
