"""Cycles of the lossless mode on the fast path: all rounds and the dense pass are launched before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specattn.breakeven import Size
from specattn.fast.ahead import RunAhead
from specattn.fast.cycle import AheadRound, DensePass, SelfRound
from specattn.fast.landing import Run
from specattn.fast.pass_scores import PassScores
from specattn.fast.requests import READS
from specattn.fast.self_lists import SelfLists
from specattn.fast.speculator import FastSpeculator, Ready, Shared, Work, shape_of
from specattn.landed import Landed
from specattn.ledger import CycleLedger
from specattn.plan import Plan
from specattn.sampling import SamplingState
from specattn.selection.self import Self
from specattn.speculation import Speculator
from specattn.target_scores import SCORED_ROWS

STEP = 4
"""Rows of a dense pass come in multiples of this: each number of them is a graph of its own."""


@dataclass(frozen=True)
class CycleLanded:
    """A cycle that has come back to the host.

    Attributes:
        rounds: for each request, how many tokens each of its sparse rounds gave.
        accepted: how many of them the dense pass chose itself.
        delivered: what it chose, the first that differs included.
        reads_ahead, reads: bytes since the request began, see :class:`specattn.landed.Landed`: up to the dense pass,
            and behind it.
        seconds_ahead, seconds: what the rounds and the dense pass took.
    """

    rounds: Sequence[Sequence[int]]
    accepted: Sequence[int]
    delivered: Sequence[Sequence[int]]
    reads_ahead: Sequence[Sequence[float]]
    reads: Sequence[Sequence[float]]
    seconds_ahead: float
    seconds: float

    @classmethod
    def of(cls, ahead: Landed, verified: Landed) -> CycleLanded:
        """What the reports of the last round and of the dense pass say."""
        return cls(
            [[count for count in row if count] for row in ahead.tokens],
            [row[0] for row in verified.tokens],
            [row[1:] for row in verified.tokens],
            ahead.reads,
            verified.reads,
            ahead.seconds,
            verified.seconds,
        )

    def enter(
        self,
        ledger: CycleLedger,
        slots: Sequence[int],
        plan: Plan,
        size: Size,
        before: Sequence[Sequence[float]],
    ) -> None:
        """Enter the cycle in the ledger; ``before`` are the requests' reads when it began."""
        rounds = max(map(len, self.rounds))
        for number in range(rounds):
            ledger.add_round(plan, size, self.seconds_ahead / rounds)
            for slot, counts, old, new in zip(slots, self.rounds, before, self.reads_ahead, strict=True):
                if number < len(counts):
                    ledger.add_request(slot, plan, counts[number] - 1, _share(old, new))
        tokens = [sum(counts) for counts in self.rounds]
        for slot, proposed, accepted in zip(slots, tokens, self.accepted, strict=True):
            ledger.add_pass(slot, proposed, accepted)
        ledger.add_cost(self.seconds_ahead * len(slots) / sum(tokens), self.seconds)


class FastCycles(FastSpeculator):
    """Runs whole cycles on the device.

    Args:
        slow: the speculator of the sparse rounds.
        most: the most tokens that a cycle may run ahead.
        gamma: the largest draft length.
        shared: where the models are merged already.
    """

    def __init__(self, slow: Speculator, most: int, gamma: int, shared: Shared | None = None) -> None:
        super().__init__(slow, shared=shared)
        self._most = most
        # Rows are rounded up, a round writes all its tokens whether they count or not, and one is pending.
        self._ahead = RunAhead(self.target.cache.spare_slot, most + STEP + gamma + 2, self.target.device)
        self._passes: dict[tuple[object, ...], Ready] = {}

    @torch.inference_mode()
    def launch_cycle(
        self, slots: Sequence[int], gamma: int, sampling: SamplingState, *, every: int, rounds: int
    ) -> Callable[[], CycleLanded]:
        """Start a cycle of the requests in ``slots``; what is returned waits for it.

        Args:
            gamma: draft tokens of a sparse round.
            sampling: only what it tells the host is used.
            every: tokens after which a request runs no further ahead.
            rounds: sparse rounds of the cycle.
        """
        ahead = self._ready(len(slots), gamma, sampling)
        verify = self._pass(len(slots), min(every + gamma, rounds * (gamma + 1)), sampling)
        self._remember(slots, gamma)
        self._ahead.wanted.fill_(every)
        ahead.assign(slots)
        verify.assign(slots)
        landings, requests = (next(ahead.landings), next(verify.landings)), len(slots)
        landings[0].launch(_repeated(ahead, rounds))
        landings[1].launch(verify.run)
        return lambda: CycleLanded.of(*(landing.land(requests) for landing in landings))

    def _make(self, *parts: Any, **shape: Any) -> AheadRound:
        if not isinstance(self.method, Self):
            return AheadRound(self._ahead, *parts, **shape)
        assert self.scores is not None
        # Behind a dense pass lie what it verified itself, and then what is run ahead of it.
        most = max(SCORED_ROWS, self._most) + self._most + shape["gamma"] + 1
        operations = self._shared.target.decoder.operations
        lists = SelfLists(self.method, operations, self.scores, batch=shape["batch"], most=most)
        return SelfRound(lists, self._ahead, *parts, **shape)

    def _prepare(self, work: Work, batch: int, width: int) -> Ready:
        ready = super()._prepare(work, batch, width)
        if isinstance(work, SelfRound):
            ready.first = self._captured(work.begin)
        return ready

    def _width(self, gamma: int) -> int:
        return self._ahead.rounds.shape[1] + 1 + READS

    def _pass(self, requests: int, rows: int, sampling: SamplingState) -> Ready:
        padded, rows, *_ = key = shape_of(requests, -(-rows // STEP) * STEP, sampling)
        if key not in self._passes:
            shared = self._shared
            scores = None if self.scores is None else PassScores(shared.target, self.scores, padded)
            dense = DensePass(
                shared.target,
                shared.requests,
                self._ahead,
                batch=padded,
                rows=rows,
                sampling=sampling,
                scores=scores,
            )
            self._passes[key] = self._prepare(dense, padded, rows + 2 + READS)
        return self._passes[key]


def _repeated(ready: Ready, times: int) -> Run:
    """So many rounds, and the report of the last."""

    def repeated() -> Tensor:
        if ready.first is not None:
            ready.first()
        for _ in range(times - 1):
            ready.run()
        return ready.run()

    return repeated


def _share(before: Sequence[float], after: Sequence[float]) -> float:
    """What part of its full reads the target read in between."""
    read, full = (new - old for old, new in zip(before[:2], after[:2], strict=True))
    return read / full
