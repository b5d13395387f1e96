"""Greedy continuation of texts by the lossless mode, timed in whole cycles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from specattn.attention import DenseAttend, attached
from specattn.benchmarks.continuation import Starts
from specattn.benchmarks.decode_gate import BOUND, shortfalls
from specattn.benchmarks.setting import Setting
from specattn.breakeven import BreakEven, Size
from specattn.byte_model import ByteModel, Footprint
from specattn.every import EveryPolicy
from specattn.fast.cycles import CycleLanded, FastCycles
from specattn.fast.speculator import Shared
from specattn.ledger import CycleLedger
from specattn.plan import Plan
from specattn.sampling import SamplingParams, SamplingState
from specattn.selection.base import Method, Need
from specattn.speculation import Batch, Speculator
from specattn.target_scores import ScoringAttend, TargetScores

WARM_UPS = 4
"""Cycles before those that are timed: ``auto`` learns in them how long they should be."""

CYCLES = 20


@dataclass(frozen=True)
class Cycles:
    """What cycles of a batch were like, on average.

    Attributes:
        ms, wall_ms: of a cycle, on the device and, the median, for the host.
        dense_ms: of its dense pass.
        tokens: delivered to one request.
        ahead: run ahead by it.
        rounds: sparse rounds of a request.
        largest_rounds: of the one that had most.
        acceptance: of the draft's tokens, if there are any.
        read, full, draft_read: bytes of keys and values of a cycle, all requests: read by the target, by one that reads
            all of them in as many passes, and by the draft.
        amiss: share of the delivered tokens that fall short of a dense PyTorch pass's best by more than rounding does.
    """

    ms: float
    wall_ms: float
    dense_ms: float
    tokens: float
    ahead: float
    rounds: float
    largest_rounds: float
    acceptance: float | None
    read: float
    full: float
    draft_read: float
    amiss: float


def room(every: int | str, gamma: int) -> int:
    """Tokens that the cycles may add to each request."""
    return (WARM_UPS + CYCLES + 1) * (EveryPolicy(every).largest + gamma + 1)


def continue_losslessly(setting: Setting, starts: Starts, method: Method, every: int | str) -> Cycles:
    """Decode from ``starts``, greedily, in :data:`CYCLES` cycles; without the draft if ``method`` needs none."""
    decoding = _Decoding(setting, starts, method, every)
    for _ in range(WARM_UPS):
        decoding.cycle()
    before, landed, walls = decoding.reads, [], []
    for _ in range(CYCLES):
        began = perf_counter()
        landed.append(decoding.cycle())
        walls.append(perf_counter() - began)
    bytes_read = [
        sum(row[column] for row in decoding.reads) - sum(row[column] for row in before) for column in range(3)
    ]
    return _summary(decoding.plan.gamma, landed, walls, bytes_read, decoding.amiss(starts))


class _Decoding:
    """The requests of a batch on their way."""

    def __init__(self, setting: Setting, starts: Starts, method: Method, every: int | str) -> None:
        pair, target = setting.pair, setting.target.runner
        drafts = Need.DRAFT in method.needs or method.draft_p < 1
        draft = setting.draft if drafts else None
        self.plan = Plan(setting.gamma if drafts else 0, sparse=True)
        footprint = Footprint.of(draft.runner.model) if draft else None
        model = ByteModel(Footprint.of(target.model), footprint, method)
        self._ledger = CycleLedger(EveryPolicy(every), BreakEven([self.plan], model))
        slow = Speculator(target, draft.runner if draft else None, method, pair.mapping, pair.vocab_size)
        if slow.scores is not None:
            _score(slow, slow.scores, starts)
        shared = Shared.between(setting.target, draft)
        self._cycles = FastCycles(slow, self._ledger.most_tokens, self.plan.gamma, shared)
        self._slots = list(range(setting.batch))
        self._lengths = [start.length for start in starts.requests]
        self._sampling = SamplingState.of([SamplingParams()] * setting.batch, target.device)
        recent = torch.tensor([start.recent for start in starts.requests], device=target.device)
        rounds = torch.zeros(setting.batch, dtype=torch.int64, device=target.device)
        self._cycles.enter(Batch(self._slots, self._lengths, recent, rounds, self._sampling))
        for slot in self._slots:
            self._ledger.open(slot)
        self._target, self._texts = target, [[start.recent[1]] for start in starts.requests]
        meters = [target.meter.read, target.meter.full]
        meters.append(draft.runner.meter.read if draft else torch.zeros_like(meters[0]))
        self.reads: Sequence[Sequence[float]] = torch.stack(meters, 1)[: setting.batch].tolist()

    def cycle(self) -> CycleLanded:
        """One cycle of all requests."""
        every, rounds = self._ledger.choose(self.plan.gamma)
        launch, size = self._cycles.launch_cycle, Size(len(self._slots), sum(self._lengths))
        landed = launch(self._slots, self.plan.gamma, self._sampling, every=every, rounds=rounds)()
        landed.enter(self._ledger, self._slots, self.plan, size, self.reads)
        self.reads = landed.reads
        for slot, tokens in enumerate(landed.delivered):
            self._lengths[slot] += len(tokens)
            self._texts[slot] += tokens
        return landed

    def amiss(self, starts: Starts) -> float:
        """What dense passes over everything that was delivered say of it."""
        target, amiss = self._target, 0
        bound = BOUND[target.model.dtype]
        with attached(target.model):
            for slot, (start, text) in enumerate(zip(starts.requests, self._texts, strict=True)):
                tokens = torch.tensor([text], device=target.device)
                step = target.step([slot], [start.length], len(text) - 1, DenseAttend(), metered=False)
                logits = target.forward(step, tokens[:, :-1], len(text) - 1)
                amiss += int(
                    (shortfalls(logits[..., : self._cycles.vocab_size], tokens[:, 1:]) > bound).sum()
                )
        return amiss / sum(len(text) - 1 for text in self._texts)


def _score(speculator: Speculator, scores: TargetScores, starts: Starts) -> None:
    """Read the last token of each request densely once more, for a method that wants to know what it attends to."""
    target = speculator.target
    with attached(target.model):
        for slot, start in enumerate(starts.requests):
            step = target.step([slot], [start.length - 1], 1, ScoringAttend(scores), metered=False)
            target.forward(step, torch.tensor([[start.recent[0]]], device=target.device), keep=1)
            scores.commit(slot, 1)


def _summary(
    gamma: int,
    landed: Sequence[CycleLanded],
    walls: Sequence[float],
    bytes_read: Sequence[float],
    amiss: float,
) -> Cycles:
    cycles, requests = len(landed), len(landed[0].rounds)
    each = cycles * requests
    ahead = sum(sum(map(sum, cycle.rounds)) for cycle in landed)
    rounds = sum(sum(map(len, cycle.rounds)) for cycle in landed)
    dense = sum(cycle.seconds for cycle in landed)
    read, full, draft_read = (figure / cycles for figure in bytes_read)
    return Cycles(
        ms=1e3 * (dense + sum(cycle.seconds_ahead for cycle in landed)) / cycles,
        wall_ms=1e3 * median(walls),
        dense_ms=1e3 * dense / cycles,
        tokens=sum(sum(map(len, cycle.delivered)) for cycle in landed) / each,
        ahead=ahead / each,
        rounds=rounds / each,
        largest_rounds=sum(max(map(len, cycle.rounds)) for cycle in landed) / cycles,
        acceptance=(ahead - rounds) / (gamma * rounds) if gamma else None,
        read=read,
        full=full,
        draft_read=draft_read,
        amiss=amiss,
    )
