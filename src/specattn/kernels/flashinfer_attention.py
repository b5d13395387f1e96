"""FlashInfer's paged attention behind the seam of :mod:`specattn.kernels.paged_attention`, to compare with.

FlashInfer plans each launch on the host, from lengths that it copies there, so a round of these cannot be captured in
a CUDA graph. It knows one list of pages a request: lists of KV heads are given to it as requests of one head whose
pages hold one token, the paper's own route.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.errors import UsageError
from specattn.selection.base import Selection

Launch = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries ``[requests * rows, heads, head_dim]`` over the pool's keys and values, as planned."""

WORKSPACE_BYTES = 256 << 20


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("flashinfer") is not None


class FlashInferAttention:
    """Dense and sparse attention of one model, launch after launch: they share a workspace.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        if not available():
            raise UsageError(
                "attention=flashinfer needs FlashInfer, which is not installed: "
                "pip install 'specattn[flashinfer]', or use attention=triton"
            )
        self._workspace = workspace(device)
        self._planned: tuple[Tensor, Launch] | None = None

    def dense(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        slots: Tensor,
        lengths: Tensor,
        positions: Tensor,
        scaling: float,
        page_size: int,
        *,
        out: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Attention over the first ``lengths`` tokens of each slot.

        The arguments are those of :func:`specattn.kernels.paged_attention.dense_paged_attention`; what tunes that
        kernel is ignored. The rows must be the last tokens, and each request must have as many. A plan is made once
        for a tensor ``lengths``, and serves all layers that pass the same one: its content must not change.
        """
        if self._planned is None or self._planned[0] is not lengths:
            held = lengths.cpu()
            counts = -(-held // page_size)
            used = (
                torch.arange(block_table.shape[1], device=block_table.device)
                < counts.to(slots.device)[:, None]
            )
            launch = plan(
                self._workspace,
                query,
                keys.shape[1],
                block_table[slots][used].int(),
                counts.int(),
                (held - (counts - 1) * page_size).int(),
                page_size,
                scaling,
            )
            self._planned = lengths, launch
        result = self._planned[1](query.reshape(-1, *query.shape[2:]), keys, values)
        return _into(out, result.view(query.shape))

    def sparse(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        slots: Tensor,
        selection: Selection,
        positions: Tensor,
        scaling: float,
        page_size: int,
        *,
        out: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Attention over selected tokens, planned anew for each layer's lists.

        The arguments are those of :func:`specattn.kernels.paged_attention.sparse_paged_attention`. Each list must end
        with the rows' own tokens.

        Raises:
            UsageError: the tokens have weights, which FlashInfer cannot add.
        """
        if selection.log_weights is not None:
            raise UsageError("attention=flashinfer adds no log-weights to logits; use attention=triton")
        kv_heads, indices = keys.shape[1], selection.padded().indices
        pages = token_pages(block_table, slots, indices, page_size) * kv_heads
        pages += torch.arange(kv_heads, device=pages.device)[:, None]
        by_list = (
            query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
        )  # [lists, rows, group, head_dim]
        counts = selection.counts.flatten().cpu().int()
        chosen = pages[indices >= 0].int()
        launch = plan(self._workspace, by_list, 1, chosen, counts, torch.ones_like(counts), 1, scaling)
        result = launch(by_list.flatten(0, 1), keys, values).view(by_list.shape)
        result = result.unflatten(0, (-1, kv_heads)).transpose(1, 2).flatten(2, 3)
        return _into(out, result)


def workspace(device: torch.device) -> Tensor:
    """What launches in sequence can share."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def token_pages(block_table: Tensor, slots: Tensor, indices: Tensor, page_size: int) -> Tensor:
    """Pool rows, int64, of the tokens ``indices`` ``[batch, kv_heads, n]``; of padding those of token 0."""
    token = indices.clamp(min=0).long()
    pages = block_table[slots].gather(1, (token // page_size).flatten(1)).long().view_as(token)
    return pages * page_size + token % page_size


def plan(
    workspace: Tensor,
    query: Tensor,
    kv_heads: int,
    pages: Tensor,
    counts: Tensor,
    last: Tensor,
    page_size: int,
    scaling: float,
) -> Launch:
    """Plan one launch: decode for one row a request, otherwise causal attention of the last rows.

    Args:
        query: ``[requests, rows, heads, head_dim]``, of which only shape and dtype count.
        kv_heads: of a request.
        pages: int32, those of all requests, one after the other.
        counts, last: int32 ``[requests]`` on the host, pages of a request and tokens in the last of them.
    """
    package: Any = importlib.import_module("flashinfer")
    requests, rows, heads, head_dim = query.shape
    ends = pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    shape = (heads, kv_heads, head_dim, page_size)
    types = {"sm_scale": scaling, "q_data_type": query.dtype, "kv_data_type": query.dtype}
    if rows == 1:
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(ends, pages, last, *shape, **types)
    else:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts = torch.arange(requests + 1, dtype=torch.int32) * rows
        wrapper.plan(starts, ends, pages, last, *shape, causal=True, **types)
    layout = (-1, page_size, kv_heads, head_dim)
    return lambda queries, keys, values: wrapper.run(queries, (keys.view(layout), values.view(layout)))


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
