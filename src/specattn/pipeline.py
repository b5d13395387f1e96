"""Which round is next, and when it is launched: where rounds run ahead, before the host has read the last one.

The next round does not need what the host reads: what it begins with is on the device. A request that turns out to have
ended in the last round has then had one round too many. Nothing is left of it: its tokens are not looked at, the
account is the one before it, and whoever gets the request's pages writes them after that round, since all work on the
device is done in the order of its launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

from specattn.breakeven import BreakEven
from specattn.errors import CacheFullError
from specattn.memory import shortage
from specattn.plan import Plan
from specattn.request import ActiveRequest
from specattn.rounds import Flight, Rounds, size_of


class Pipeline:
    """Rounds one after the other, each with the plan that pays.

    Args:
        rounds: runs them.
        policy: chooses the plans, and is told of what they gave.
        context_limit: tokens that the models can take; no row lies beyond.
        lossless: whether rounds are whole cycles, which tell the policy of their rounds themselves.
    """

    def __init__(self, rounds: Rounds, policy: BreakEven, context_limit: int, *, lossless: bool) -> None:
        self.rounds, self.policy = rounds, policy
        self.context_limit, self.lossless = context_limit, lossless
        self._flight: Flight | None = None
        self._before: Flight | None = None
        self._settled = 0.0

    def advance(self, active: Mapping[int, ActiveRequest]) -> Iterator[tuple[int, int]]:
        """Launch one round for all requests that go on, and take in the one that is due: this one or the one before.

        Args:
            active: requests by their numbers. The caller may take a request out as soon as it has been yielded.

        Yields:
            The number of each request that the round served, and how many tokens it had before.

        Raises:
            CacheFullError: the device has too little memory for a round.
        """
        requests = self._going_on(active)
        plan = self.policy.choose(size_of(requests)) if requests else None
        if plan and self._must_know(requests, plan):
            yield from self._drain(active)
            requests = self._going_on(active)
        with self._fitting(requests):
            flight = self._launch(requests, plan) if plan and requests else None
        if self.rounds.ahead:
            flight, self._flight = self._flight, flight
        yield from self._settle(flight, active)

    def _going_on(self, active: Mapping[int, ActiveRequest]) -> dict[int, ActiveRequest]:
        """The requests of the next round: all but those that the round in flight will end, as it has a token."""
        in_flight = self._flight.requests if self._flight is not None else {}
        return {
            id: request
            for id, request in active.items()
            if request.finish_reason is None and len(request.tokens) + (id in in_flight) < request.limit
        }

    def _must_know(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> bool:
        """Whether the next round depends on what the host has not read: near the context's end, or for the draft."""
        if self._flight is None:
            return False
        ahead = self._flight.plan.gamma
        return self._rows_left(requests) < plan.gamma + ahead + 1 or ahead == 0 < plan.gamma

    def _rows_left(self, requests: Mapping[int, ActiveRequest]) -> int:
        """Draft tokens for which the context has room."""
        return self.context_limit - 1 - max(request.length for request in requests.values())

    @contextmanager
    def _fitting(self, requests: Mapping[int, ActiveRequest]) -> Iterator[None]:
        """Say what needs less where a round of ``requests`` runs out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            longest = max(request.length for request in requests.values())
            raise CacheFullError(
                f"{self.rounds.speculator.target.device} has not enough memory for a round of {len(requests)} "
                f"requests of up to {longest:,} tokens: {shortage(error)}. Serve fewer at once (max_batch, --batch), "
                "or shorter ones"
            ) from error

    def _launch(self, requests: Mapping[int, ActiveRequest], plan: Plan) -> Flight:
        """Start a round in which no row lies beyond the context's end.

        gamma is not cut to what the requests may still produce: a request's rounds, and with them what a sparse method
        selects, would then depend on its neighbours. Near the context's end, and with ``auto``, they do.
        """
        plan = Plan(max(0, min(plan.gamma, self._rows_left(requests))), plan.sparse)
        if plan.gamma:
            for request in requests.values():
                self._catch_up(request)
        return self.rounds.launch(requests, plan)

    def _catch_up(self, request: ActiveRequest) -> None:
        """Let the draft read what was decoded without it."""
        draft = self.rounds.speculator.draft
        assert draft is not None
        behind = draft.cache.length(request.slot)
        if behind < request.length - 1:
            draft.prefill(request.slot, request.text[behind : request.length - 1])

    def _drain(self, active: Mapping[int, ActiveRequest]) -> Iterator[tuple[int, int]]:
        """Wait for the round in flight."""
        flight, self._flight = self._flight, None
        return self._settle(flight, active)

    def _settle(
        self, flight: Flight | None, active: Mapping[int, ActiveRequest]
    ) -> Iterator[tuple[int, int]]:
        """Take in what a round has produced; requests that have ended by now had it for nothing."""
        if flight is None:
            return
        landed = flight.land()
        if not self.lossless:
            self.policy.observe(flight.plan, flight.size, self._seconds(flight, landed.seconds))
        served = zip(flight.requests.items(), landed.tokens, landed.reads, strict=True)
        for (id, request), tokens, reads in served:
            if id in active:
                known = len(request.tokens)
                self._take(request, flight.plan, tokens, reads)
                yield id, known

    def _seconds(self, flight: Flight, device: float) -> float:
        """What a round costs: the time on the ``device``, or that between two rounds where the host is slower.

        The latter counts only among rounds that are alike: a request that is read, or a graph that is captured, between
        two rounds says nothing of them.
        """
        before, self._before = self._before, flight
        began, self._settled = self._settled, perf_counter()
        near = [other for other in (before, self._flight) if other is not None]
        if len(near) == 2 and all(
            other.plan == flight.plan and other.requests.keys() == flight.requests.keys() for other in near
        ):
            return max(device, self._settled - began)
        return device

    def _take(
        self, request: ActiveRequest, plan: Plan, tokens: Sequence[int], reads: Sequence[float]
    ) -> None:
        accepted = len(tokens) - 1
        request.accepted.append(accepted)
        request.proposed += plan.gamma
        if not self.lossless:
            share = (reads[0] - request.reads[0]) / (reads[1] - request.reads[1])
            self.policy.observe_request(plan, accepted, share)
        request.reads = reads
        request.push(tokens)
        self.rounds.commit(request, plan)
