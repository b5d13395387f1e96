"""What the rows of a dense pass attend to: kept for the rounds that follow, once it is known which rows stand."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.fast.model import FastModel
from specattn.kernels.paged import PagedBatch
from specattn.kernels.round_scores import LARGEST_BLOCK
from specattn.target_scores import LAST_ROWS, TargetScores


class PassScores:
    """Scores of the tokens before a dense pass: those of :mod:`specattn.target_scores`, for all requests at once.

    Attention itself keeps its sums only. When the pass is over, one more pass over the keys scores the tokens for the
    last rows that stand, if a tile of the kernel holds as many.

    Args:
        scores: where they go.
        batch: requests of a pass, padding included.
    """

    def __init__(self, target: FastModel, scores: TargetScores, batch: int) -> None:
        self.target, self.scores = target, scores
        geometry, device = target.runner.geometry, target.runner.device
        self._most = min(LAST_ROWS, LARGEST_BLOCK // (1 << (geometry.group - 1).bit_length()))
        self._request = torch.arange(batch, device=device)[:, None]
        # No head is exported; the kernel wants a place for them all the same.
        shape = (geometry.layers, geometry.query_heads)
        self._places = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._exported = scores.probabilities.new_zeros(batch, 1, scores.probabilities.shape[-1])
        self._queries: list[Tensor] = []
        self._lse: list[Tensor] = []

    def of(self, layer: int, query: Tensor) -> Tensor:
        """Where the log-sum-exps ``[batch, rows, query_heads]`` of a layer's attention go."""
        if layer == 0:
            self._queries, self._lse = [], []
        self._queries.append(query)
        self._lse.append(torch.empty(query.shape[:3], dtype=torch.float32, device=query.device))
        return self._lse[-1]

    def keep(self, slots: Tensor, starts: Tensor, positions: Tensor, standing: Tensor) -> None:
        """Score the first ``starts`` ``[batch]`` tokens for the last of the ``standing`` ``[batch]`` rows.

        Args:
            positions: of all rows, ``[batch, rows]``; those behind a request's own repeat its last.
        """
        cache, own = self.target.runner.cache, self.scores.probabilities
        rows = min(self._most, positions.shape[1])
        place = standing[:, None] - rows + torch.arange(rows, device=slots.device)
        chosen = (self._request, place.clamp(min=0))
        # The kernel's rows see one token more each. All see the context, and nobody looks at what is behind it.
        seen = PagedBatch(cache.block_table, slots, (starts + rows - 1).int(), cache.page_size)
        queries = torch.stack(self._queries)[:, *chosen]
        sums = torch.stack(self._lse)[:, *chosen].masked_fill((place < 0)[..., None], float("inf"))
        self.target.decoder.operations.round_scores(
            queries.movedim(2, 0),
            cache.key_pool,
            seen,
            sums.movedim(2, 0),
            self._places,
            self.target.scaling,
            heads_out=self._exported,
            own_out=own.flatten(1, 2),
        )
        self.scores.positions[slots] = starts.int()
        self.scores.ends[slots] = (starts + standing).int()
