"""FlashInfer's paged decode on the cache of this project: the peer of the attention kernels.

It reads one list of pages a request and has one query row. Its plans are made on the host, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specattn.cache import PagedKVCache
from specattn.kernels.flashinfer_attention import available, plan, token_pages, workspace
from specattn.selection.base import Selection

__all__ = ["FlashInferDecode", "available"]

Launch = Callable[[], Tensor]


class FlashInferDecode:
    """Launches over one layer of ``cache``, in sequence: they share a workspace."""

    def __init__(self, cache: PagedKVCache, query_heads: int, scaling: float) -> None:
        self.cache = cache
        self.group = query_heads // cache.geometry.kv_heads
        self.scaling = scaling
        self.workspace = workspace(cache.device)

    def dense(self, query: Tensor, slots: Tensor, length: int) -> Launch:
        """The first ``length`` tokens of ``slots``, whole pages, for ``query`` ``[batch, query_heads, head_dim]``."""
        pages = length // self.cache.page_size
        table = self.cache.block_table[slots, :pages]
        counts = torch.full((len(slots),), pages, dtype=torch.int32)
        return self._launch(
            query, table.flatten(), counts, self.cache.page_size, self.cache.geometry.kv_heads
        )

    def sparse(self, query: Tensor, slots: Tensor, selection: Selection) -> Launch:
        """The selected tokens as pages of one token and one head: every KV head of a request is a request."""
        _, kv_heads, _ = selection.indices.shape
        heads = torch.arange(kv_heads, device=slots.device)[:, None]
        rows = token_pages(self.cache.block_table, slots, selection.indices, self.cache.page_size)
        pages = rows * kv_heads + heads
        by_head = query.unflatten(1, (kv_heads, self.group)).flatten(0, 1)
        chosen = pages[selection.indices >= 0].int()
        launch = self._launch(by_head, chosen, selection.counts.flatten().cpu(), 1, 1)
        return lambda: launch().view(query.shape)

    def _launch(self, query: Tensor, pages: Tensor, counts: Tensor, page_size: int, kv_heads: int) -> Launch:
        """Plan one launch: ``pages`` of all requests, of which each has ``counts`` (on the host), the last one full."""
        last = torch.full_like(counts, page_size)
        launch = plan(self.workspace, query[:, None], kv_heads, pages, counts, last, page_size, self.scaling)
        return lambda: launch(query, self.cache.keys[0], self.cache.values[0])
