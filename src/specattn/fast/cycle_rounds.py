"""Cycles of the lossless mode on the fast path, as the engine sees them: rounds that yield many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specattn.fast.cycles import FastCycles
from specattn.fast.rounds import AskedSampling
from specattn.landed import Landed
from specattn.lossless import LosslessSpeculator
from specattn.plan import Plan
from specattn.request import ActiveRequest
from specattn.rounds import CycleRounds, Flight, batch_of, size_of


class FastCycleRounds(CycleRounds):
    """Cycles whose requests stand where the device knows; near the context's end those of PyTorch take over."""

    def __init__(self, cycles: LosslessSpeculator) -> None:
        super().__init__(cycles)
        ledger = cycles.ledger
        self._fast = FastCycles(cycles.sparse, ledger.most_tokens, ledger.policy.largest_gamma)
        self._asked = AskedSampling()
        self._unknown: set[int] = set()

    def enter(self, active: ActiveRequest) -> None:
        """The device is told of the request before its first cycle."""
        self._unknown.add(active.slot)

    def launch(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> Flight:
        """Start the next cycle of these requests."""
        active = list(requests.values())
        every, rounds = self._cycles.ledger.choose(plan.gamma)
        if max(each.length for each in active) + every + plan.gamma > self._cycles.context_limit:
            self._unknown.update(each.slot for each in active)
            return super().launch(requests, plan)
        self._make_known(active)
        size, slots = size_of(requests), [each.slot for each in active]
        land = self._fast.launch_cycle(
            slots, plan.gamma, self._asked.of(requests), every=every, rounds=rounds
        )

        def settle() -> Landed:
            landed = land()
            landed.enter(self._cycles.ledger, slots, plan, size, [each.reads for each in active])
            return Landed(landed.delivered, landed.reads, landed.seconds_ahead + landed.seconds)

        return Flight(requests, plan, size, settle)

    def _make_known(self, active: Sequence[ActiveRequest]) -> None:
        """Tell the device where requests stand that it does not know, or that have had other cycles since."""
        unknown = [each for each in active if each.slot in self._unknown]
        if unknown:
            self._fast.enter(batch_of(unknown, self._fast.target.device))
            self._unknown.difference_update(each.slot for each in unknown)
