"""Rounds on the fast path: one is launched before the last one has landed."""

from __future__ import annotations

from collections.abc import Mapping

from specattn.fast.speculator import FastSpeculator
from specattn.plan import Plan
from specattn.request import ActiveRequest
from specattn.rounds import Flight, Variants, batch_of, size_of
from specattn.sampling import SamplingState
from specattn.speculation import Speculator


class AskedSampling:
    """What the requests' sampling tells the host; worked out when they change."""

    def __init__(self) -> None:
        self._known: tuple[tuple[int, ...], SamplingState] = ((), SamplingState.of([]))

    def of(self, requests: Mapping[int, ActiveRequest]) -> SamplingState:
        """What that of ``requests`` tells."""
        if self._known[0] != tuple(requests):
            params = [active.request.sampling for active in requests.values()]
            self._known = (tuple(requests), SamplingState.of(params))
        return self._known[1]


class FastRounds:
    """Rounds whose requests stand where the device knows; see :class:`specattn.rounds.Rounds`."""

    ahead = True

    def __init__(self, slow: Speculator) -> None:
        self.speculator = FastSpeculator(slow)
        self._variants = Variants(self.speculator)
        self._asked = AskedSampling()

    def enter(self, active: ActiveRequest) -> None:
        """Tell the device where the request stands."""
        self.speculator.enter(batch_of([active], self.speculator.target.device))

    def prepare(self, plan: Plan, requests: int) -> None:
        """Compile and capture greedy rounds of so many requests."""
        speculator = self._variants.of(plan)
        assert isinstance(speculator, FastSpeculator)
        speculator.prepare(requests, plan.gamma)

    def launch(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> Flight:
        """Start the next round of these requests."""
        speculator = self._variants.of(plan)
        assert isinstance(speculator, FastSpeculator)
        slots = [active.slot for active in requests.values()]
        land = speculator.launch(slots, plan.gamma, self._asked.of(requests))
        return Flight(requests, plan, size_of(requests), land)

    def commit(self, active: ActiveRequest, plan: Plan) -> None:
        """Set the caches' lengths, which prefill and the host's account go by."""
        self._variants.of(plan).commit(active.slot, active.length)
