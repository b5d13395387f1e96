"""Attention over lists of quantised keys: what Twilight prunes by (arXiv 2502.02770, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.device import has_kernels
from specattn.kernels.paged import PagedBatch
from specattn.kernels.quantised_keys import QuantisedKeys
from specattn.kernels.quantised_scores import quantised_scores
from specattn.kernels.split_kv import LARGEST_BLOCK, SplitWorkspace

WIDE = 16
"""Scores whose lists are as long as a multiple of this are written in wide stores."""


def listed_attention(
    query: Tensor, copy: QuantisedKeys, rows: Tensor, counts: Tensor, scaling: float
) -> Tensor:
    """The attention of a round's rows over lists of tokens, from their quantised keys alone.

    The kernel of :mod:`specattn.kernels.quantised_scores`, to which each KV head of a request is a request of one
    head, and its list a block table of pages of one token.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.
        copy: the layer's quantised keys.
        rows: int64 ``[batch, kv_heads, capacity]``, pool rows of the listed tokens, ascending in their positions. The
            round's own tokens end each list.
        counts: int32 ``[batch, kv_heads]``, how many entries are valid.
        scaling: factor of the logits.

    Returns:
        float32 ``[batch, kv_heads, rows, group, capacity]``; 0 behind a row's own token.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    (batch, kv_heads, capacity), n = rows.shape, query.shape[1]
    group, lists = query.shape[2] // kv_heads, batch * kv_heads
    heads = torch.arange(kv_heads, device=rows.device)[:, None] * copy.codes.shape[1]
    table = (rows + heads).flatten(0, 1).int()
    lengths = counts.flatten().int().contiguous()
    paged = PagedBatch(table, torch.arange(lists, device=rows.device), lengths, page_size=1)
    one_head = QuantisedKeys(copy.codes.flatten(0, 1)[None], copy.ranges.flatten(0, 1)[None], copy.bits)
    shape = (lists, n, group)
    logits = torch.empty(*shape, -(-capacity // WIDE) * WIDE, device=query.device)
    lse = torch.empty(shape, device=query.device)
    workspace = SplitWorkspace.allocate(
        batch=lists,
        rows=n,
        query_heads=group,
        kv_heads=1,
        head_dim=query.shape[-1],
        length=capacity,
        device=query.device,
    )
    by_list = query.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(0, 1)
    quantised_scores(by_list, one_head, paged, scaling, logits=logits, lse=lse, workspace=workspace)
    weights = (logits[..., :capacity] - lse[..., None]).exp().view(batch, kv_heads, n, group, capacity)
    return weights.masked_fill(~_seen(counts, n, capacity), 0)


def listed_attention_reference(
    query: Tensor, copy: QuantisedKeys, rows: Tensor, counts: Tensor, scaling: float
) -> Tensor:
    """The same in float32 PyTorch."""
    n, capacity = query.shape[1], rows.shape[2]
    keys = copy.gather(rows)
    grouped = query.float().unflatten(2, (rows.shape[1], -1)).permute(0, 2, 1, 3, 4)
    logits = grouped @ keys.mT[:, :, None] * scaling
    seen = _seen(counts, n, capacity)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def runs_on(query: Tensor, copy: QuantisedKeys) -> bool:
    """Whether the kernel runs where ``query`` ``[batch, rows, query_heads, head_dim]`` is, and takes it."""
    rows = query.shape[1] * query.shape[2] // copy.codes.shape[0]
    return has_kernels(query.device) and copy.has_kernels and rows <= LARGEST_BLOCK


def _seen(counts: Tensor, rows: int, capacity: int) -> Tensor:
    """bool ``[batch, kv_heads, rows, 1, capacity]``: up to a row's own token, which lies that far from the end."""
    stop = counts[..., None] - rows + 1 + torch.arange(rows, device=counts.device)
    return (torch.arange(capacity, device=counts.device) < stop[..., None])[..., None, :]
