"""What :mod:`specattn.kernels.paged_attention` computes, in PyTorch: the rows are gathered first."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.sparse_attention import sparse_attention
from specattn.selection.base import Selection


def no_schedule(counts: Tensor, workspace: object, *, listed: bool) -> None:
    """Nothing is shared among programs here."""


def sparse_paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    slots: Tensor,
    selection: Selection,
    positions: Tensor,
    scaling: float,
    page_size: int,
    lse: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Softmax attention over selected tokens; the arguments are the kernel's, and those that tune it are ignored."""
    selection = selection.padded()
    indices = selection.indices.clamp(min=0).long()
    pages = block_table[slots].gather(1, (indices // page_size).flatten(1)).long().view_as(indices)
    rows = pages * page_size + indices % page_size
    heads = torch.arange(keys.shape[1], device=keys.device)[None, :, None]
    out = sparse_attention(query, keys[rows, heads], values[rows, heads], selection, positions, scaling, lse)
    return out.nan_to_num(0)  # NaN: the rows that see nothing


def dense_paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    positions: Tensor,
    scaling: float,
    page_size: int,
    lse: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Softmax attention over the first ``lengths`` tokens of each slot."""
    token = torch.arange(block_table.shape[1] * page_size, device=keys.device)
    mask = (token < lengths[:, None])[:, None].expand(-1, keys.shape[1], -1)
    selection = Selection.from_mask(mask)
    return sparse_paged_attention_reference(
        query, keys, values, block_table, slots, selection, positions, scaling, page_size, lse
    )
