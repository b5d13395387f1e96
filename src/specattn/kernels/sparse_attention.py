"""Verification attention: the rows of a round over the KV rows that were selected, one list a KV head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specattn.selection.base import Selection


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    selection: Selection,
    positions: Tensor,
    scaling: float,
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax attention over selected tokens, renormalised over them.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.
        keys, values: ``[batch, kv_heads, capacity, head_dim]``, gathered at ``selection.indices``.
        selection: which tokens these are; entries of -1 are padding. A row sees the selected tokens up to its own
            position, and its pseudo-tokens; one that sees nothing gives zeros. ``log_weights`` are added to the
            logits.
        positions: ``[batch, rows]``, the rows' token positions.
        scaling: factor of the logits.
        lse: where the logarithms of the sums go, if they are wanted: float32 ``[batch, rows, query_heads]``.

    Returns:
        ``[batch, rows, query_heads, head_dim]``, in the query's dtype; computed in float32.
    """
    batch, rows, query_heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(batch, rows, kv_heads, query_heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    logits = grouped.float() @ keys.float().transpose(-1, -2)[:, :, None] * scaling
    indices = selection.indices[:, :, None, None]
    if selection.log_weights is not None:
        logits = logits + selection.log_weights[:, :, None, None].float()
    visible = (indices >= 0) & (indices <= positions[:, None, None, :, None])
    logits, values = logits.masked_fill(~visible, float("-inf")), values.float()
    if selection.pseudo is not None:
        others = grouped.float() @ selection.pseudo.keys.transpose(-1, -2)[:, :, None] * scaling
        others = others + selection.pseudo.log_weights[:, :, None, None]
        logits, values = torch.cat([logits, others], -1), torch.cat([values, selection.pseudo.values], 2)
    if lse is not None:
        lse.copy_(logits.logsumexp(-1).permute(0, 3, 1, 2).flatten(2))
    # NaN in a row that sees nothing
    probabilities = logits.softmax(-1).masked_fill(logits == float("-inf"), 0)
    out = probabilities @ values[:, :, None]
    return out.permute(0, 3, 1, 2, 4).reshape(batch, rows, query_heads, head_dim).to(query.dtype)


def trim(selection: Selection) -> Selection:
    """Cut the padding that no list uses. Asks the device for the longest list: for the PyTorch path only."""
    longest = max(1, int(selection.counts.max()))
    if longest >= selection.indices.shape[-1]:
        return selection
    weights = selection.log_weights
    return replace(
        selection,
        indices=selection.indices[..., :longest],
        log_weights=None if weights is None else weights[..., :longest],
    )
