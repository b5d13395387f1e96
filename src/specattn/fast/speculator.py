"""Rounds on the fast path, behind the interface of :class:`specattn.speculation.Speculator`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specattn.fast import decoder, selector
from specattn.fast.inputs import RoundInputs
from specattn.fast.model import FastModel
from specattn.fast.operations import Operations
from specattn.fast.round import FastRound
from specattn.sampling import SamplingState
from specattn.speculation import Batch, Outcome, Speculator


def unsupported(speculator: Speculator) -> str | None:
    """Why these models and this method cannot take the fast path; ``None`` if they can."""
    reason = selector.unsupported(speculator.method)
    for runner in (speculator.target, speculator.draft):
        if runner is not None:
            reason = reason or decoder.unsupported(runner.model)
    return reason


@dataclass(frozen=True)
class _Ready:
    """A round of one shape, ready to run."""

    inputs: RoundInputs
    run: Callable[[], Outcome]


class FastSpeculator(Speculator):
    """Runs whole rounds on the device: as CUDA graphs on a GPU, operation by operation elsewhere.

    Batches of other sizes than powers of two are padded. What is captured depends on the padded size, on gamma and on
    what the sampling asks of the host, and is captured when it is first needed.

    Args:
        slow: the speculator whose place it takes.
        operations: what rounds are made of; what suits the device if ``None``.
    """

    def __init__(self, slow: Speculator, operations: Operations | None = None) -> None:
        super().__init__(slow.target, slow.draft, slow.method, slow.mapping, slow.vocab_size, slow.observer)
        self._models = [
            None if runner is None else FastModel.of(runner, self.vocab_size, operations)
            for runner in (self.target, self.draft)
        ]
        self._rounds: dict[tuple[object, ...], _Ready] = {}
        captured = self.target.device.type == "cuda" and (operations is None or operations.captured)
        self._memory = torch.cuda.graph_pool_handle() if captured else None

    @torch.inference_mode()
    def round(self, batch: Batch, gamma: int) -> Outcome:
        """One round, see :meth:`specattn.speculation.Speculator.round`."""
        ready = self._ready(len(batch.slots), gamma, batch.sampling)
        ready.inputs.load(batch)
        outcome = ready.run()
        count = len(batch.slots)
        return Outcome(outcome.tokens[:count], outcome.counts[:count])

    def _ready(self, requests: int, gamma: int, sampling: SamplingState) -> _Ready:
        padded = 1 << (requests - 1).bit_length()
        key = (padded, gamma, sampling.sampled, sampling.max_top_k, sampling.uses_top_p)
        if key not in self._rounds:
            self._rounds[key] = self._build(padded, gamma, sampling)
        return self._rounds[key]

    def _build(self, batch: int, gamma: int, sampling: SamplingState) -> _Ready:
        target, draft = self._models
        assert target is not None
        cache = self.target.cache
        round = FastRound(
            target,
            draft,
            self.method,
            self.mapping,
            batch=batch,
            gamma=gamma,
            sampling=sampling,
            length=cache.block_table.shape[1] * cache.page_size,
        )
        if self._memory is None:
            return _Ready(round.inputs, round.run)
        from specattn.fast.graph import CapturedRound

        return _Ready(round.inputs, CapturedRound(round.run, self._memory))
