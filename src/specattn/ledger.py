"""What the cycles of the lossless mode did, request by request, and how long the next one is to be."""

from __future__ import annotations

import math

from specattn.breakeven import BreakEven, Size
from specattn.every import EveryPolicy
from specattn.plan import Plan
from specattn.request import CycleAccount


class CycleLedger:
    """Accounts of the requests, and the two policies that learn from them.

    Args:
        every: how many tokens are run ahead.
        policy: learns from the sparse rounds, of which the engine sees nothing.
    """

    def __init__(self, every: EveryPolicy, policy: BreakEven) -> None:
        self.every, self.policy = every, policy
        self._accounts: dict[int, CycleAccount] = {}

    @property
    def most_tokens(self) -> int:
        """The most tokens that a cycle may run ahead: the last round can begin one short of what is wanted."""
        return self.every.largest + self.policy.largest_gamma

    def open(self, slot: int) -> None:
        """A new request in ``slot``."""
        self._accounts[slot] = CycleAccount()

    def account(self, slot: int) -> CycleAccount:
        """What the cycles of the request in ``slot`` did."""
        return self._accounts[slot]

    def choose(self, gamma: int) -> tuple[int, int]:
        """How many tokens a request of the next cycle is to run ahead, and how many rounds it has for that at most.

        As many rounds as these tokens take on average: the requests of a batch wait for each other, and one that is
        slower has fewer tokens verified instead.
        """
        every = self.every.choose()
        return every, math.ceil(every / self.policy.acceptance.tokens(gamma))

    def add_round(self, plan: Plan, size: Size, seconds: float) -> None:
        """A sparse round of all requests took so long."""
        self.policy.observe(plan, size, seconds)

    def add_request(self, slot: int, plan: Plan, accepted: int, share: float) -> None:
        """The part of one request: ``accepted`` draft tokens, with ``share`` of its cache read."""
        self._accounts[slot].rounds.append(accepted)
        self._accounts[slot].drafted += plan.gamma
        self.policy.observe_request(plan, accepted, share)

    def add_pass(self, slot: int, proposed: int, accepted: int) -> None:
        """A dense pass over ``proposed`` tokens of one request, of which it chose ``accepted`` itself."""
        self._accounts[slot].add_pass(proposed, accepted)
        self.every.observe(accepted, proposed)

    def add_cost(self, token: float, dense_pass: float) -> None:
        """What a token cost in sparse rounds, and what the dense pass cost, in one unit."""
        self.every.observe_cost(token, dense_pass)
