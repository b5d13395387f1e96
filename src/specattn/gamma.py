"""How many tokens the draft proposes a round: a number, or as many as pay, and how many of them are accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specattn.errors import UsageError

AUTO = "auto"

LARGEST_GAMMA = 64
"""The largest draft length: what a round's share of a request's random numbers is enough for."""

GAMMAS = (1, 2, 4, 6, 8)
"""What ``auto`` chooses from. Between neighbours the yield differs by little, and on a GPU each is a graph more."""

PRIOR = (3.0, 4.0)
"""Accepted and decided tokens before any are known: a weak prior, which keeps the first choices moderate."""

FADING = 1 / 256
"""How much of the acceptance rate is forgotten in a round without proposals."""

ENOUGH = 100
"""Decided tokens from which on the estimate is taken at its word."""


def check_gamma(gamma: int | str) -> None:
    """Refuse a draft length that is neither a number from 1 to :data:`LARGEST_GAMMA` nor ``auto``.

    Raises:
        UsageError: naming the value.
    """
    if gamma == AUTO:
        return
    if not isinstance(gamma, int) or isinstance(gamma, bool) or not 1 <= gamma <= LARGEST_GAMMA:
        raise UsageError(
            f"gamma={gamma!r} must be a whole number of at least 1 and at most {LARGEST_GAMMA}, or {AUTO!r}"
        )


@dataclass
class Acceptance:
    """The acceptance rate of a proposed token, given that those before it were accepted.

    It is accepted tokens over decided ones, with a decay that forgets old rounds.
    """

    decay: float = 0.99
    _accepted: float = PRIOR[0]
    _decided: float = PRIOR[1]

    @property
    def rate(self) -> float:
        """The estimate."""
        return self._accepted / self._decided

    @property
    def hope(self) -> float:
        """The rate, plus what a standard error of so few decided tokens exceeds that of :data:`ENOUGH` by.

        So a few rounds of bad luck do not end the proposals, after which there would be nothing to learn from.
        """
        spread = math.sqrt(self.rate * (1 - self.rate))
        return min(1.0, self.rate + spread * max(0.0, self._decided**-0.5 - ENOUGH**-0.5))

    def tokens(self, gamma: int, rate: float | None = None) -> float:
        """Expected tokens of a round, ``(1 - a^(gamma+1)) / (1 - a)``, for the estimate or another ``rate`` a."""
        a = self.rate if rate is None else rate
        return sum(a**i for i in range(gamma + 1))

    def observe(self, accepted: int, proposed: int) -> None:
        """Learn from a round of one request: the first rejection decides one token, the rest stay unknown."""
        self._accepted = self._accepted * self.decay + accepted
        self._decided = self._decided * self.decay + accepted + (accepted < proposed)

    def fade(self) -> None:
        """Doubt what is known, as a round without proposals teaches nothing: else bad luck could end them for good."""
        self._accepted += FADING * (PRIOR[0] - self._accepted)
        self._decided += FADING * (PRIOR[1] - self._decided)
