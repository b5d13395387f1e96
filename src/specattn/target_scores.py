"""What the target's last dense pass looked at: true scores, to be joined with what the draft says.

A dense pass happens when the prompt's last rows are read and in rounds that a method makes dense. Scores of sparse
passes are not kept: they are zero where nothing was read, and what they say would be selected again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.attention import DenseAttend, LayerCall, Step
from specattn.geometry import KVGeometry
from specattn.kernels.dense_attention import attention_probabilities, weighted_values
from specattn.prefill.base import PrefillMethod
from specattn.runner import ModelRunner, Progress
from specattn.selection.base import Selection

SCORED_ROWS = 5
"""Rows of a prompt whose scores are kept: as many as a round of the usual draft length has."""

LAST_ROWS = 8
"""Rows of a pass that its scores are the mean of, the last that stand: more of them say nothing more."""

DTYPE = torch.bfloat16
"""Half of float32, with the range that tiny probabilities need."""


@dataclass(frozen=True)
class StoredScores:
    """The scores of a round's requests.

    Attributes:
        probabilities: ``[batch, layers, kv_heads, length]``: attention of the last dense pass to the context before
            it, the sum of its rows and of a group's query heads over so many as there can be; zero from ``positions``
            on. Only what tokens of one head have in proportion to each other means something. Nothing of use in layers
            that the method reads densely anyway.
        positions: int32 ``[batch]``, how many tokens that context had; 0 where there was no such pass.
        ends: int32 ``[batch]``, where the rows of that pass ended that stand: the position of what was fed next.
        everything: bool ``[batch]``, whose turn it is to read everything, so that new scores can be taken.
    """

    probabilities: Tensor
    positions: Tensor
    ends: Tensor
    everything: Tensor

    @property
    def nbytes(self) -> Tensor:
        """Bytes of one layer's scores that a round reads, float64 ``[batch]``: none where everything is read anyway."""
        token_bytes = self.probabilities.shape[2] * self.probabilities.element_size()
        return torch.where(self.everything, 0, self.positions.double() * token_bytes)


class TargetScores:
    """The scores of all slots, on the device.

    Rows are recorded while a pass runs and count once :meth:`commit` says how many of them were accepted.

    Args:
        slots, length: slots, and the longest request.
    """

    def __init__(self, geometry: KVGeometry, *, slots: int, length: int, device: torch.device) -> None:
        shape = (slots, geometry.layers, geometry.kv_heads, length)
        self.group = geometry.group
        self.probabilities = torch.zeros(shape, dtype=DTYPE, device=device)
        self.positions, self.ends = (torch.zeros(slots, dtype=torch.int32, device=device) for _ in range(2))
        self._rounds = [0] * slots
        self._rows: dict[int, dict[int, Tensor]] = {}

    @classmethod
    def of(cls, target: ModelRunner) -> TargetScores:
        """Empty scores for all slots of ``target``, the spare one included."""
        table = target.cache.block_table
        length = table.shape[1] * target.cache.page_size
        return cls(target.geometry, slots=len(table), length=length, device=target.device)

    def rounds(self, slot: int) -> int:
        """Rounds of ``slot`` since its last dense pass."""
        return self._rounds[slot]

    def reset(self, slot: int) -> None:
        """Forget the scores of ``slot``."""
        self.positions[slot], self.ends[slot], self._rounds[slot] = 0, 0, 0
        self._rows.pop(slot, None)

    def copy(self, source: TargetScores) -> None:
        """Take the scores of all slots of another one of the same shape."""
        self.probabilities.copy_(source.probabilities)
        self.positions.copy_(source.positions)
        self.ends.copy_(source.ends)
        self._rounds, self._rows = list(source._rounds), {}

    def record(self, slot: int, layer: int, probabilities: Tensor, start: int) -> None:
        """Keep the ``probabilities`` ``[query_heads, rows, length]`` of rows from position ``start`` on.

        Only what they say of the context before them is kept: tokens of their own pass may yet be rejected.
        """
        context = probabilities[..., :start].unflatten(0, (-1, self.group)).mean(1)
        self._rows.setdefault(slot, {})[layer] = context

    def commit(self, slot: int, rows: int) -> None:
        """The pass of ``slot`` is over and its first ``rows`` rows stand; it was dense if it left any record."""
        recorded = self._rows.pop(slot, None)
        self._rounds[slot] = 0 if recorded else self._rounds[slot] + 1
        if not recorded:
            return
        for layer, context in recorded.items():
            scores = context[:, max(0, rows - LAST_ROWS) : rows].sum(1) / LAST_ROWS
            self.probabilities[slot, layer] = pad(
                scores.to(DTYPE), (0, self.probabilities.shape[-1] - scores.shape[-1])
            )
            self.positions[slot] = scores.shape[-1]
        self.ends[slot] = self.positions[slot] + rows

    def stored(self, slots: Sequence[int], length: int, everything: Sequence[bool]) -> StoredScores:
        """The scores of ``slots`` over the first ``length`` tokens."""
        device = self.positions.device
        chosen = torch.tensor(slots, device=device)
        return StoredScores(
            self.probabilities[chosen][..., :length],
            self.positions[chosen],
            self.ends[chosen],
            torch.tensor(everything, device=device),
        )

    def prefill(
        self,
        target: ModelRunner,
        slot: int,
        prompt: Sequence[int],
        *,
        method: PrefillMethod | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read ``prompt`` into ``slot``, its last rows densely, and keep their scores.

        Returns:
            The last token's logits ``[vocab]``.
        """
        self.reset(slot)
        split = max(0, len(prompt) - SCORED_ROWS)
        if split:
            target.prefill(slot, prompt[:split], method=method, progress=progress)
        logits = target.prefill(slot, prompt[split:], attend=ScoringAttend(self), progress=progress)
        self.commit(slot, len(prompt) - split)
        return logits


class ScoringAttend(DenseAttend):
    """Dense, and what the rows attend to is recorded in ``scores``."""

    def __init__(self, scores: TargetScores) -> None:
        self.scores = scores

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        if call.window is not None:
            return super().attend_request(step, call, request)
        probabilities, segments = _exact(step, call, request)
        self.scores.record(step.host_slots[request], call.layer, probabilities, step.starts[request])
        return weighted_values(probabilities, segments).to(call.query.dtype)


class ScoreEverything:
    """Observes sparse layers: records the rows of the requests that read everything in this round."""

    def __init__(self, scores: TargetScores, everything: Sequence[bool]) -> None:
        self.scores, self.everything = scores, everything

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        for request, reads in enumerate(self.everything):
            if reads:
                probabilities, _ = _exact(step, call, request)
                self.scores.record(step.host_slots[request], call.layer, probabilities, step.starts[request])


def _exact(step: Step, call: LayerCall, request: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    segments, _ = step.segments(call.layer, request, None)
    query, start = call.query[request, : step.row_count(request)], step.starts[request]
    return attention_probabilities(query, segments, start, 0, call.scaling), segments
