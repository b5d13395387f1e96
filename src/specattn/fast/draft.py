"""The draft's part of a round: its steps, and the scores that they leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.fast.decoder import AttendLayer
from specattn.fast.model import FastModel
from specattn.fast.operations import Operations
from specattn.fast.step import Step, seen_by_steps
from specattn.kernels.paged import PagedBatch
from specattn.kernels.score_export import ScoreExport, export_places
from specattn.kernels.split_kv import SplitWorkspace


@dataclass(frozen=True)
class ExportedScores:
    """Scores of the draft's rows of a round.

    Attributes:
        places: int32 ``[layers, query_heads]``: each head's place, -1 for those that export nothing.
        logits: ``[batch, rows, heads, length]``, a row a step.
        lse: float32 ``[batch, rows, heads]``.
    """

    places: Tensor
    logits: Tensor
    lse: Tensor

    @classmethod
    def allocate(
        cls, model: FastModel, heads: Tensor | None, batch: int, rows: int, length: int
    ) -> ExportedScores:
        """Room for the scores of ``heads`` (int64, of all if ``None``) over ``length`` tokens."""
        geometry, device = model.runner.geometry, model.runner.device
        if heads is None:
            heads = torch.arange(geometry.layers * geometry.query_heads)
        # Strides in multiples of 64 elements keep the kernels' stores wide.
        width = -(-length // 64) * 64
        return cls(
            export_places(heads.cpu(), geometry.layers, geometry.query_heads).to(device),
            torch.zeros(batch, rows, len(heads), width, dtype=model.decoder.operations.scores, device=device),
            torch.zeros(batch, rows, len(heads), device=device),
        )

    def mix(self, operations: Operations, weights: Tensor, seen: Tensor, out: Tensor) -> None:
        """Mixtures ``[batch, targets, length]`` of the heads' mean rows; ``weights`` are ``[targets, heads]``."""
        operations.head_mixture(self.logits, self.lse, weights, seen, out=out)

    def of(self, layer: int, row: int) -> ScoreExport:
        """Where the scores of one layer of the step ``row`` go."""
        return ScoreExport(self.places[layer], self.logits[:, row], self.lse[:, row])


class DraftSteps(Step):
    """Attention of the draft's steps, dense, with workspaces of its own.

    Args:
        batch: requests, padding included.
        length: the most tokens that a request can have.
        scores: where the attention scores go, if the method wants them.
    """

    def __init__(self, model: FastModel, batch: int, length: int, scores: ExportedScores | None) -> None:
        self.model, self.operations, self.scores = model, model.decoder.operations, scores
        geometry, device = model.runner.geometry, model.runner.device
        self.workspace = SplitWorkspace.allocate(
            batch=batch,
            rows=2,
            query_heads=geometry.query_heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            length=length,
            device=device,
        )

    def begin(self, slots: Tensor, lengths: Tensor, echoes: Tensor | None = None) -> None:
        """Nothing: a dense draft has no lists."""

    def finish(self, slots: Tensor, lengths: Tensor) -> None:
        """Nothing: the scores are there."""

    def count(self, slots: Tensor, lengths: Tensor, steps: int) -> None:
        """Account for what a round of ``steps`` reads."""
        runner = self.model.runner
        runner.meter.add_round(slots, seen_by_steps(lengths, steps), runner.geometry.layers)

    def _attend(self, slots: Tensor, positions: Tensor, row: int) -> AttendLayer:
        cache = self.model.runner.cache
        batch = PagedBatch(cache.block_table, slots, (positions[:, -1] + 1).int(), cache.page_size)

        def attend(layer: int, query: Tensor) -> Tensor:
            return self.operations.export_attention(
                query,
                cache.keys[layer],
                cache.values[layer],
                batch,
                self.model.scaling,
                out=torch.empty_like(query),
                workspace=self.workspace,
                export=None if self.scores is None else self.scores.of(layer, row),
            )

        return attend
