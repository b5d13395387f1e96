"""Collect both models' attention in sampled rounds of a text, in bounded memory.

The text streams through both models in chunks, as in a prefill. A sampled round at position n keeps the attention of
the rows that such a round would have, over the context ``[0, n)``: averaged over the rows, renormalised, one
distribution a head. It is what the selection must predict: the round's own tokens are read in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specattn.attention import DenseAttend, LayerCall, Step
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.dense_attention import attention_probabilities
from specattn.mapping.samples import RoundSample
from specattn.pairs import Pair
from specattn.runner import ModelRunner

CHUNK = 512
"""Tokens a pass; a sampled round lies within one."""

DTYPE = torch.bfloat16
"""Statistics are held in half the memory; bfloat16 keeps the range that tiny probabilities need."""

Progress = Callable[[str, int], None]


def round_positions(tokens: int, rounds: int, rows: int, generator: torch.Generator) -> list[int]:
    """Where the sampled rounds begin: one at random in each of ``rounds`` equal stretches behind the first eighth.

    Early positions are left out: there is little to choose from. A round never crosses a chunk's end.

    Raises:
        UsageError: if the text is too short for rounds to be sampled.
    """
    first = max(tokens // 8, 16)
    room = tokens - rows - first
    if room < rounds:
        raise UsageError(
            f"{tokens} tokens are too few to sample {rounds} rounds of {rows} rows; use a longer text or fewer rounds"
        )
    edges = torch.linspace(0, room, rounds + 1)
    widths = edges[1:] - edges[:-1]
    starts = (edges[:-1] + torch.rand(rounds, generator=generator) * widths).long() + first
    # Pull a round that would cross a chunk's end back in front of it.
    over = (starts % CHUNK + rows - CHUNK).clamp(min=0)
    return sorted(set((starts - over).tolist()))


class RecordAttend(DenseAttend):
    """Dense, and the attention of the rounds at ``positions`` is kept in :attr:`samples`.

    Attributes:
        samples: for each position n, bfloat16 ``[layers * query_heads, n]``.
    """

    def __init__(
        self, geometry: KVGeometry, positions: Sequence[int], rows: int, device: torch.device
    ) -> None:
        self.geometry, self.rows = geometry, rows
        heads = geometry.layers * geometry.query_heads
        self.samples = {n: torch.zeros(heads, n, dtype=DTYPE, device=device) for n in positions}

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        start = step.starts[request]
        stop = start + call.query.shape[1]
        for n in self.samples:
            if start <= n < stop:
                self._record(step, call, request, n)
        return super().attend_request(step, call, request)

    def _record(self, step: Step, call: LayerCall, request: int, n: int) -> None:
        first = 0 if call.window is None else max(0, n - call.window + 1)
        slot = step.host_slots[request]
        segments = step.cache.segments(call.layer, slot, first, n + self.rows)
        offset = n - step.starts[request]
        query = call.query[request, offset : offset + self.rows]
        rows = attention_probabilities(query, segments, n, first, call.scaling, call.window)
        context = rows[..., : n - first].mean(1)
        context = context / context.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        heads = self.geometry.query_heads
        self.samples[n][call.layer * heads : (call.layer + 1) * heads, first:] = context.to(DTYPE)


def collect(
    pair: Pair,
    tokens: Sequence[int],
    *,
    rounds: int,
    gamma: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[RoundSample]:
    """Statistics of ``rounds`` rounds of a text. The models must be attached to specattn's attention.

    The target's rows are the gamma + 1 of a verification pass, the draft's the gamma that it has when the target's
    tokens are selected.
    """
    assert pair.draft is not None
    positions = round_positions(len(tokens), rounds, gamma + 1, generator)
    recorded = []
    for role, model, rows in (("target", pair.target, gamma + 1), ("draft", pair.draft, gamma)):
        runner = ModelRunner(model, tokens=len(tokens), slots=1)
        record = RecordAttend(runner.geometry, positions, rows, runner.device)
        slot = runner.cache.allocate(len(tokens))
        report = _labelled(progress, role)
        runner.prefill(slot, tokens, chunk=CHUNK, attend=record, progress=report)
        recorded.append(record.samples)
        del runner
    return [RoundSample(recorded[0][n], recorded[1][n]) for n in positions]


def statistics_bytes(target: KVGeometry, draft: KVGeometry, tokens: int, rounds: int) -> int:
    """Memory that :func:`collect` keeps for a text: rounds lie at half its length on average."""
    heads = target.layers * target.query_heads + draft.layers * draft.query_heads
    return heads * tokens * rounds * DTYPE.itemsize * 9 // 16


def _labelled(progress: Progress | None, role: str) -> Callable[[int], None] | None:
    return (lambda count: progress(role, count)) if progress else None
