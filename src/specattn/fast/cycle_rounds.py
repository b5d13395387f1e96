"""Cycles of the lossless mode on the fast path, as the engine sees them: rounds that yield many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from specattn.breakeven import Size
from specattn.fast.cycles import CycleLanded, FastCycles
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
        return Flight(requests, plan, size, lambda: self._learn(active, plan, size, rounds, land))

    def _make_known(self, active: Sequence[ActiveRequest]) -> None:
        """Tell the device where requests stand that it does not know, or that have had other cycles since."""
        unknown = [each for each in active if each.slot in self._unknown]
        if unknown:
            self._fast.enter(batch_of(unknown, self._fast.target.device))
            self._unknown.difference_update(each.slot for each in unknown)

    def _learn(
        self,
        active: Sequence[ActiveRequest],
        plan: Plan,
        size: Size,
        rounds: int,
        land: Callable[[], CycleLanded],
    ) -> Landed:
        """Wait for a cycle and enter it in the ledger."""
        landed, ledger = land(), self._cycles.ledger
        for number in range(rounds):
            ledger.add_round(plan, size, landed.seconds_ahead / rounds)
            for each, counts, reads in zip(active, landed.rounds, landed.reads_ahead, strict=True):
                if number < len(counts):
                    ledger.add_request(each.slot, plan, counts[number] - 1, _share(each.reads, reads))
        tokens = [sum(counts) for counts in landed.rounds]
        for each, proposed, accepted in zip(active, tokens, landed.accepted, strict=True):
            ledger.add_pass(each.slot, proposed, accepted)
        ledger.add_cost(landed.seconds_ahead * len(active) / sum(tokens), landed.seconds)
        return Landed(landed.delivered, landed.reads, landed.seconds_ahead + landed.seconds)


def _share(before: Sequence[float], after: Sequence[float]) -> float:
    """What part of its full reads the target read in between."""
    read, full = (new - old for old, new in zip(before[:2], after[:2], strict=True))
    return read / full
