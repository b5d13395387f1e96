"""A draft that reads its own nucleus: lists from the round before, scores of all tokens once a round.

In a step each KV head reads the tokens that held ``draft_p`` of its attention in the round before, on average over
that round's rows and the group's heads, and the newest tokens. What all tokens would get is worked out after the
steps, for all rows of the round in one pass over the keys (:mod:`specattn.kernels.round_scores`), or over a quantised
copy of them where the cache has one (:mod:`specattn.kernels.quantised_round_scores`). So the lists cannot lock
themselves in: tokens that were not read are scored like the others. A round reads each key once, or some of them, and a
list a step, where a dense draft reads all keys and values in each step.

KV heads that the mapping does not use are scored by turns (:mod:`specattn.fast.turns`). In between their lists are made
from scores that are some rounds old, and hold all tokens that have come since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.fast.decoder import AttendLayer
from specattn.fast.model import FastModel
from specattn.fast.operations import Operations
from specattn.fast.step import Step, seen_by_steps
from specattn.fast.turns import TURNS, Turns, following
from specattn.kernels.paged import PagedBatch
from specattn.kernels.score_export import export_places
from specattn.selection.base import Selection

if TYPE_CHECKING:
    from specattn.kernels.schedule import Schedule

SINK, WINDOW = 4, 32
"""Tokens that the draft's lists always hold: the first, and the newest that have been scored."""


def newest(rows: int, turns: int = TURNS) -> int:
    """Tokens at the end of every list of so many steps.

    What this round and those since a head was scored, ``turns`` at most, have added has no scores yet.
    """
    return WINDOW + (turns + 1) * (rows + 1)


class DraftMemory:
    """What each slot's draft attended to when its heads were last scored.

    Attributes:
        scores: ``[slots + 1, layers * kv_heads, length]``, each KV head's mean attention. Where there has been no round
            the first token's is infinite, which makes lists whole. No token that has not come yet has a score, unless
            another was there and was rejected.
        rounds: int64 ``[slots + 1]``, whose turn it is to be scored, see :class:`specattn.fast.turns.Turns`.
    """

    def __init__(self, model: FastModel, length: int) -> None:
        geometry, cache = model.runner.geometry, model.runner.cache
        slots, device = cache.spare_slot + 1, model.runner.device
        self.scores = torch.zeros(
            (slots, geometry.layers * geometry.kv_heads, length),
            dtype=model.decoder.operations.probabilities,
            device=device,
        )
        self.scores[..., 0] = float("inf")
        self.rounds = torch.zeros(slots, dtype=torch.int64, device=device)
        self._steps: dict[int, int] = {}

    def prepare(self, slots: Sequence[int], steps: int) -> None:
        """Before a round of so many steps: what is known of requests that had other rounds since is forgotten."""
        for slot in slots:
            known = self._steps.get(slot, 0)
            if not known:
                self.scores[slot] = 0
                self.scores[slot, :, 0] = float("inf")
            if steps < known or not known:
                # Longer rounds may have left more tokens without scores than lists of shorter ones end with: now all
                # heads have their turn.
                self.rounds[slot] = 0
            self._steps[slot] = steps

    def forget(self, slots: Sequence[int]) -> None:
        """These slots have new requests, or rounds that leave no scores."""
        for slot in slots:
            self._steps.pop(slot, None)


class MeanScores:
    """Attention of the heads that the mapping uses, averaged over the rows of a round.

    Attributes:
        heads: ``[batch, heads, length]``; more heads than the mapping has are zeros.
    """

    WHOLE = 8
    """Heads come in multiples of so many: products of other depths take ways that cannot load in wide pieces."""

    def __init__(self, heads: Tensor) -> None:
        self.heads = heads
        self._weights: Tensor | None = None

    @classmethod
    def allocate(cls, batch: int, heads: int, length: int, like: Tensor) -> MeanScores:
        """Room for so many heads, in the dtype and on the device of ``like``."""
        return cls(like.new_zeros(batch, -(-heads // cls.WHOLE) * cls.WHOLE, length))

    def mix(self, operations: Operations, weights: Tensor, seen: Tensor, out: Tensor) -> None:
        """See :meth:`specattn.fast.draft.ExportedScores.mix`."""
        if self._weights is None:  # the same in each round
            missing = self.heads.shape[1] - weights.shape[1]
            self._weights = pad(weights.to(self.heads.dtype), (0, missing))
        torch.matmul(self._weights, self.heads, out=out)


class SparseDraftSteps(Step):
    """Attention of the draft's steps over its own lists.

    Args:
        memory: of all rounds of these models.
        heads: numbers ``layer * query_heads + head`` of those that the mapping uses; all if ``None``, none if empty.
        p: share of its attention that a list holds.
        batch: requests, padding included.
        rows: steps of a round.
    """

    def __init__(
        self,
        model: FastModel,
        memory: DraftMemory,
        heads: Tensor | None,
        *,
        p: float,
        batch: int,
        rows: int,
    ) -> None:
        self.model, self.operations, self.memory = model, model.decoder.operations, memory
        self.p, self.rows = p, rows
        self.workspace = model.workspace(batch, rows=2)
        geometry, device = model.runner.geometry, model.runner.device
        if heads is None:
            heads = torch.arange(geometry.layers * geometry.query_heads)
        self._places = export_places(heads.cpu(), geometry.layers, geometry.query_heads).to(device)
        self._turns = Turns(self._places, geometry.kv_heads)
        self._due: Tensor | None = None
        length, lists = memory.scores.shape[-1], (batch, geometry.layers * geometry.kv_heads)
        self.scores = MeanScores.allocate(batch, len(heads), length, like=memory.scores)
        self._lists = Selection(
            torch.full((*lists, length), -1, dtype=torch.int32, device=device),
            torch.zeros(lists, dtype=torch.int32, device=device),
        )
        self._schedule: Schedule | None = None
        self._attended: list[Tensor] = []
        # Of each step's last row; the first step has two.
        steps = (rows, geometry.layers, batch, geometry.query_heads)
        self._queries = torch.zeros(*steps, geometry.head_dim, dtype=geometry.dtype, device=device)
        self._lse = torch.zeros(steps, device=device)
        self._first_lse = torch.zeros(*steps[1:3], 2, steps[3], device=device)

    def begin(self, slots: Tensor, lengths: Tensor, echoes: Tensor | None = None) -> None:
        """Make the lists of a round of requests with ``lengths`` tokens in the target's cache, ``echoes`` in them."""
        self._attended = []
        self.operations.nucleus_lists(
            self.memory.scores,
            self.p,
            (lengths + self.rows).int(),
            capacity=self._lists.indices.shape[-1],
            sink=SINK,
            recent=newest(self.rows, self._turns.count),
            out=self._lists,
            entries=slots,
            also=echoes,
            fill=False,
        )
        # For the lists of the last step: those of the others are shorter.
        self._schedule = self.operations.schedule(
            self._of_layers(without=0).counts, self.workspace, listed=True
        )

    def _attend(self, slots: Tensor, positions: Tensor, row: int) -> AttendLayer:
        cache = self.model.runner.cache
        # The last entries are the round's own tokens: those of later steps have no keys and values yet.
        lists = self._of_layers(without=self.rows - 1 - row)

        def attend(layer: int, query: Tensor) -> Tensor:
            lse = self._lse[row, layer, :, None] if row else self._first_lse[layer]
            out = self.operations.sparse_attention(
                query,
                cache.keys[layer],
                cache.values[layer],
                cache.block_table,
                slots,
                lists.of_layer(layer),
                positions,
                self.model.scaling,
                cache.page_size,
                lse=lse,
                workspace=self.workspace,
                schedule=self._schedule and self._schedule.of_layer(layer),
                settled=True,
            )
            self._attended.append(query[:, -1])
            return out

        return attend

    def finish(self, slots: Tensor, lengths: Tensor) -> None:
        """Score all tokens for the round's rows, the last of which sees ``lengths + rows`` tokens.

        In one graph whatever the round is: the device counts rounds and knows whose turn it is.
        """
        runner, operations, copy = self.model.runner, self.operations, self.model.quantised_keys
        layers, cache = runner.geometry.layers, runner.cache
        seen = PagedBatch(cache.block_table, slots, (lengths + self.rows).int(), cache.page_size)
        # Apart: the first step's rows do not lie side by side, which would make all of them slow to copy.
        torch.stack(self._attended[:layers], out=self._queries[0])
        if self.rows > 1:
            torch.stack(self._attended[layers:], out=self._queries[1:].flatten(0, 1))
        self._lse[0] = self._first_lse[:, :, -1]
        self._due = self._take_turns(slots)
        score = operations.round_scores if copy is None else operations.quantised_round_scores
        score(
            self._queries,
            cache.key_pool if copy is None else copy.whole,
            seen,
            self._lse,
            self._places,
            self.model.scaling,
            heads_out=self.scores.heads,
            own_out=self.memory.scores,
            due=self._due,
        )

    def _take_turns(self, slots: Tensor) -> Tensor | None:
        """Which heads of each request are scored, bool ``[batch, layers * kv_heads]``; all if ``None``."""
        if self._turns.count == 1:
            return None
        rounds = self.memory.rounds[slots]
        self.memory.rounds[slots] = following(rounds)
        return self._turns.due(rounds)

    def count(self, slots: Tensor, lengths: Tensor, steps: int) -> None:
        """Account for what a round of ``steps`` reads: its lists in each step, and once the keys that were scored."""
        meter, copy = self.model.runner.meter, self.model.quantised_keys
        # All steps but the last read shorter lists: by one entry, by two, ...
        entries, lists = self._lists.counts.sum(1, dtype=torch.int32), self._lists.counts.shape[1]
        listed = entries * steps - lists * (steps * (steps - 1) // 2)
        meter.add_round(slots, seen_by_steps(lengths, steps), 0, listed)
        heads = None if self._due is None else self._due.sum(1)
        meter.add_keys(slots, lengths + steps, None if copy is None else copy.entry_bytes, heads)

    def _of_layers(self, without: int) -> Selection:
        """The lists ``[batch, layers, kv_heads, length]`` but for their last entries."""
        shape, counts = (self.model.runner.geometry.layers, -1), self._lists.counts
        counts = counts - without if without else counts
        return Selection(self._lists.indices.unflatten(1, shape), counts.unflatten(1, shape))
