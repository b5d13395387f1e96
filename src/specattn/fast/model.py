"""A model on the fast path: its merged decoder over its paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.fast.decoder import AttendLayer, FastDecoder
from specattn.fast.operations import Operations
from specattn.kernels.tiling import Workspace
from specattn.runner import ModelRunner
from specattn.stores.quantised_keys import QuantisedKeysStore, quantised_keys_of

if TYPE_CHECKING:
    from specattn.kernels.schedule import Schedule


@dataclass(frozen=True)
class FastModel:
    """What a round asks of a model."""

    runner: ModelRunner
    decoder: FastDecoder
    vocab_size: int

    @classmethod
    def of(cls, runner: ModelRunner, vocab_size: int, operations: Operations | None = None) -> FastModel:
        """The fast form of a runner's model; :func:`specattn.fast.decoder.unsupported` must have no objection."""
        cache = runner.cache
        length = cache.block_table.shape[1] * cache.page_size
        return cls(runner, FastDecoder(runner.model, length, operations), vocab_size)

    @property
    def scaling(self) -> float:
        """Factor of the attention logits."""
        return self.decoder.head_dim**-0.5

    @property
    def quantised_keys(self) -> QuantisedKeysStore | None:
        """The quantised keys beside the cache, if it has them; every pass keeps them up to date."""
        return quantised_keys_of(self.runner.cache)

    def workspace(self, batch: int, rows: int) -> Workspace:
        """For attention over lists, or all tokens, of at most ``batch`` requests and ``rows`` rows of each."""
        geometry = self.runner.geometry
        return Workspace.allocate(
            batch=batch,
            rows=rows,
            query_heads=geometry.query_heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            device=self.runner.device,
        )

    def schedule_all(self, ends: Tensor, workspace: Workspace) -> Schedule | None:
        """How programs share the first ``ends`` ``[batch]`` tokens of each request, in every layer of a pass."""
        counts = ends[:, None, None].expand(-1, 1, self.runner.geometry.kv_heads)
        schedule = self.decoder.operations.schedule(counts, workspace, listed=False)
        return schedule and schedule.of_layer(0)

    def read(self, tokens: Tensor, slots: Tensor, positions: Tensor, attend: AttendLayer) -> Tensor:
        """Hidden states ``[batch, rows, hidden]`` of ``tokens`` ``[batch, rows]`` at ``positions``."""
        cache, copy = self.runner.cache, self.quantised_keys
        rows, copies = cache.rows(slots, positions), None if copy is None else copy.layers
        return self.decoder(tokens, positions, rows, cache.keys, cache.values, attend, copies)

    def logits(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, attend: AttendLayer, keep: int
    ) -> Tensor:
        """Logits ``[batch, keep, vocabulary]`` of the last rows of ``tokens`` ``[batch, rows]`` at ``positions``."""
        hidden = self.read(tokens, slots, positions, attend)
        # A slice of rows would be multiplied request by request, fifteen times as slow for a large vocabulary.
        kept = hidden[:, -keep:].contiguous()
        return self.decoder.logits(kept)[..., : self.vocab_size]


def steps(starts: Tensor, rows: int) -> Tensor:
    """Positions ``[batch, rows]`` from ``starts`` ``[batch]`` on."""
    # Contiguous whatever column of a table ``starts`` is.
    return starts[:, None] + torch.arange(rows, device=starts.device)
