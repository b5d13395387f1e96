"""Which plan pays: dense or sparse, and how many draft tokens, by bytes and by the times of rounds that were run.

A plan's worth is its expected tokens over its expected seconds. Seconds are bytes of the round, from
:class:`ByteModel`, times seconds a byte, which are measured: for each plan, size of batch and length of context. Plans
that were not measured at some size are judged by the most similar measurement, and get the benefit of the doubt: they
are tried if they could be the best. A plan that has not been tried for long gets some of it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specattn.byte_model import ByteModel
from specattn.gamma import Acceptance
from specattn.plan import Plan

TRIALS = 2
"""Rounds after which a plan counts as measured."""

SETTLING = 16
"""Rounds before anything is tried: a plan's first round has its price, a graph on a GPU, that must be worth paying."""

UNKNOWN, SIMILAR = 1.5, 1.15
"""How much better than predicted a plan may be: one of a mode that never ran, one of a mode that did."""

LOYALTY = 1.03
"""How much better another plan must be; a change costs something, as the draft may have to catch up."""

PATIENCE, STALENESS, MOST_STALE = 256, 0.1, 0.25
"""Rounds after which a measurement begins to be doubted, how much for each so many rounds, and how much at most."""

NEWEST = 0.1
"""Weight of the newest round in a measurement."""


@dataclass(frozen=True)
class Size:
    """How large a round is.

    Attributes:
        batch: requests.
        tokens: in the cache, all requests together.
    """

    batch: int
    tokens: int

    @cached_property
    def bucket(self) -> tuple[int, int]:
        """Sizes whose seconds a byte are alike: powers of two of the batch and of the mean context."""
        return (self.batch - 1).bit_length(), (self.tokens // self.batch).bit_length()


Case = tuple[Plan, tuple[int, int]]
"""A plan, and the bucket of the sizes at which it ran."""


@dataclass
class Measurement:
    """Seconds a byte of one plan at one size.

    Attributes:
        last: the number of the last round that was measured.
        rounds: how many were.
    """

    seconds: float
    last: int
    rounds: int = 1

    def add(self, seconds: float, now: int) -> None:
        """One more round; the first may have paid for what happens once, so the second outdoes it."""
        self.last, self.rounds = now, self.rounds + 1
        if self.rounds == 2:
            self.seconds = min(self.seconds, seconds)
        else:
            self.seconds += max(NEWEST, 1 / self.rounds) * (seconds - self.seconds)


class BreakEven:
    """Chooses the plan of each round and learns from it.

    Args:
        plans: what there is to choose from; with one of them nothing is chosen.
        model: bytes of a round.

    Attributes:
        acceptance: what is known of the draft's tokens.
        chosen: how many rounds each plan had.
    """

    def __init__(self, plans: Sequence[Plan], model: ByteModel) -> None:
        self.plans, self.model, self.acceptance = plans, model, Acceptance()
        self.chosen: Counter[Plan] = Counter()
        self._measured: dict[Case, Measurement] = {}
        self._nearest: dict[Case, Case] = {}
        self._incumbent, self._size = plans[0], Size(1, 1)

    @property
    def largest_gamma(self) -> int:
        """The largest gamma that :meth:`choose` may return."""
        return max(plan.gamma for plan in self.plans)

    def choose(self, size: Size) -> Plan:
        """The plan of the next round."""
        self._size = size
        if len(self.plans) > 1:
            self._incumbent = max(self.plans, key=lambda plan: self._promise(plan, size))
        return self._incumbent

    def observe(self, plan: Plan, size: Size, seconds: float) -> None:
        """Learn from a round that took so long."""
        self.chosen[plan] += 1
        if not plan.gamma:
            self.acceptance.fade()
        now, cost = self.chosen.total(), seconds / self.model.nbytes(plan, size.tokens)
        known = self._measured.get((plan, size.bucket))
        if known is None:
            self._nearest.clear()
        if known is None or now - known.last >= PATIENCE:
            self._measured[plan, size.bucket] = Measurement(cost, now)
        else:
            known.add(cost, now)

    def observe_request(self, plan: Plan, accepted: int, share: float) -> None:
        """Learn from a request's part of a round: draft tokens accepted, and the share of its cache that was read."""
        if plan.gamma:
            self.acceptance.observe(accepted, plan.gamma)
        if plan.sparse and plan in self.plans:  # others have been cut short at the context's end
            self.model.observe(share)

    def seconds(self, plan: Plan, size: Size) -> float:
        """What a round is expected to take."""
        cost = self._measured[self._nearest_to(plan, size)].seconds if self._measured else 1.0
        return self.model.nbytes(plan, size.tokens) * cost

    def speed(self, plan: Plan, size: Size) -> float:
        """Tokens a second of each request that there is reason to hope for."""
        return self.acceptance.tokens(plan.gamma, self.acceptance.hope) / self.seconds(plan, size)

    def report(self) -> dict[str, Any]:
        """What was chosen, what it follows from, and why the last choice is what it is, if there was one."""
        sparse = any(plan.sparse for plan in self.plans)
        return {
            "rounds": {str(plan): count for plan, count in self.chosen.most_common()},
            "acceptance": self.acceptance.rate,
            "density": self.model.density if sparse else 1.0,
            "reason": self._reason() if len(self.plans) > 1 and self._measured else None,
        }

    def _promise(self, plan: Plan, size: Size) -> float:
        loyalty = LOYALTY if plan == self._incumbent else 1.0
        return self.speed(plan, size) * max(loyalty, self._doubt(plan, size))

    def _doubt(self, plan: Plan, size: Size) -> float:
        """By what factor a plan may be faster than expected."""
        measured, now = self._measured.get((plan, size.bucket)), self.chosen.total()
        if measured is None and now < SETTLING:
            return 1.0
        if measured is None:
            return SIMILAR if self._nearest_to(plan, size)[0].mode == plan.mode else UNKNOWN
        age = now - measured.last
        stale = 1 + min(MOST_STALE, STALENESS * age / PATIENCE) if age >= PATIENCE else 1.0
        return stale if measured.rounds >= TRIALS else max(SIMILAR, stale)

    def _nearest_to(self, plan: Plan, size: Size) -> Case:
        """The measurement that says most about a plan: of its mode, then of this size, then of about its gamma.

        There must be one. It is looked for once, until something else has been measured.
        """
        here = (plan, size.bucket)
        if here in self._measured:
            return here

        def distance(case: Case) -> tuple[int, int, int]:
            other, bucket = case
            differs = sum(a != b for a, b in zip(other.mode, plan.mode, strict=True))
            far = sum(abs(a - b) for a, b in zip(bucket, size.bucket, strict=True))
            return differs, far, abs(other.gamma - plan.gamma)

        if here not in self._nearest:
            self._nearest[here] = min(self._measured, key=distance)
        return self._nearest[here]

    def _reason(self) -> str:
        """The last choice beside the best plan of every other mode, at its own size: few requests may be left."""
        best = {plan.mode: plan for plan in sorted(self.plans, key=lambda plan: self.speed(plan, self._size))}
        best.pop(self._incumbent.mode)
        worths = "; ".join(map(self._worth, [self._incumbent, *best.values()]))
        return f"at {self._size.tokens // self._size.batch:,} tokens x {self._size.batch}: {worths}"

    def _worth(self, plan: Plan) -> str:
        known = (plan, self._size.bucket) in self._measured
        took = f"{'took' if known else 'would take about'} {self.seconds(plan, self._size) * 1e3:.2f} ms"
        return f"{plan}: {self.acceptance.tokens(plan.gamma):.2f} tokens, {took}"
