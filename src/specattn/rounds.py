"""Rounds as the engine sees them: launched with a plan, read when they have landed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from specattn.breakeven import Size
from specattn.landed import Landed
from specattn.lossless import LosslessSpeculator
from specattn.plan import Plan
from specattn.request import ActiveRequest
from specattn.sampling import SamplingState
from specattn.speculation import Batch, Outcome, Speculator


@dataclass(frozen=True)
class Flight:
    """A round that was launched.

    Attributes:
        requests: whose round it is, by their numbers.
        size: how large it was when it was launched.
        land: waits for the round and says what it produced, in the order of the requests.
    """

    requests: Mapping[int, ActiveRequest]
    plan: Plan
    size: Size
    land: Callable[[], Landed]


class Rounds(Protocol):
    """How an engine runs its rounds."""

    ahead: bool
    """Whether a round may be launched before the last one has landed."""

    @property
    def speculator(self) -> Speculator:
        """The models, their caches, and how prompts are read into them."""

    def enter(self, active: ActiveRequest) -> None:
        """Take in a request whose prompt has been read."""

    def prepare(self, plan: Plan, requests: int) -> None:
        """Have greedy rounds of so many requests ready before the first of them is launched."""

    def launch(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> Flight:
        """Start the next round of these requests."""

    def commit(self, active: ActiveRequest, plan: Plan) -> None:
        """Take over what the host kept of a request's round."""


class Variants:
    """A speculator for each kind of plan, all on the same caches.

    A round without a draft leaves its cache behind; how far, the cache's length tells. A method that remembers its
    rounds runs all of them; without proposals too, so its draft never falls behind.
    """

    def __init__(self, speculator: Speculator) -> None:
        self._whole = speculator
        self._made: dict[tuple[bool, bool], Speculator] = {}

    def of(self, plan: Plan) -> Speculator:
        """The one that runs ``plan``."""
        if self._whole.remembers:
            return self._whole
        kind = (plan.gamma > 0, plan.sparse)
        if kind not in self._made:
            self._made[kind] = self._whole.variant(drafting=kind[0], sparse=kind[1])
        return self._made[kind]


class TorchRounds:
    """Rounds in PyTorch, on CPU and GPU alike; they have landed when they return."""

    ahead = False

    def __init__(self, speculator: Speculator) -> None:
        self.speculator = speculator
        self._variants = Variants(speculator)

    def enter(self, active: ActiveRequest) -> None:
        """Nothing to do: each round is told where its requests stand."""

    def prepare(self, plan: Plan, requests: int) -> None:
        """Nothing to do: nothing is compiled or captured."""

    def launch(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> Flight:
        """Run the next round of these requests."""
        started = perf_counter()
        active = list(requests.values())
        outcome = self._run(batch_of(active, self.speculator.target.device), plan)
        rows, counts = outcome.tokens.tolist(), outcome.counts.tolist()
        tokens = [row[:count] for row, count in zip(rows, counts, strict=True)]
        landed = Landed(tokens, self._reads(active), perf_counter() - started)
        return Flight(requests, plan, size_of(requests), lambda: landed)

    def commit(self, active: ActiveRequest, plan: Plan) -> None:
        """Set the caches' lengths."""
        self._variants.of(plan).commit(active.slot, active.length)

    def _run(self, batch: Batch, plan: Plan) -> Outcome:
        return self._variants.of(plan).round(batch, plan.gamma)

    def _reads(self, requests: Sequence[ActiveRequest]) -> list[list[float]]:
        slots = [active.slot for active in requests]
        target, draft = self.speculator.target, self.speculator.draft
        columns = [target.meter.read[slots], target.meter.full[slots]]
        columns.append(torch.zeros_like(columns[0]) if draft is None else draft.meter.read[slots])
        figures: list[list[float]] = torch.stack(columns, 1).tolist()
        return figures


class CycleRounds(TorchRounds):
    """Rounds that are whole cycles of the lossless mode."""

    def __init__(self, cycles: LosslessSpeculator) -> None:
        super().__init__(cycles.sparse)
        self._cycles = cycles

    def commit(self, active: ActiveRequest, plan: Plan) -> None:
        """Set the caches' lengths."""
        self._cycles.commit(active.slot, active.length)

    def _run(self, batch: Batch, plan: Plan) -> Outcome:
        return self._cycles.round(batch, plan.gamma)


def size_of(requests: Mapping[int, ActiveRequest]) -> Size:
    """How large a round of these requests is, as far as the host knows."""
    return Size(len(requests), sum(active.length for active in requests.values()))


def batch_of(requests: Sequence[ActiveRequest], device: torch.device) -> Batch:
    """Where requests stand, for a round on ``device``."""
    return Batch(
        slots=[active.slot for active in requests],
        lengths=[active.length for active in requests],
        recent=torch.tensor([active.recent for active in requests], device=device),
        # Counter 0 drew the first token, after the prefill.
        rounds=torch.tensor([len(active.accepted) + 1 for active in requests], device=device),
        sampling=SamplingState.of([active.request.sampling for active in requests], device),
    )
