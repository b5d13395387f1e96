"""How many tokens the draft proposes a round: a number, or as many as pay."""

from __future__ import annotations

from dataclasses import dataclass

from specattn.errors import UsageError

AUTO = "auto"

LARGEST_GAMMA = 64
"""The largest draft length: what a round's share of a request's random numbers is enough for."""


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
class GammaPolicy:
    """Chooses gamma from the measured acceptance rate a and the cost c of a draft step in target passes.

    A round of gamma costs ``1 + gamma c`` and yields ``(1 - a^(gamma+1)) / (1 - a)`` tokens; the gamma with the best
    ratio is used. The rate is accepted tokens over decided ones, with a decay that forgets old rounds.

    Attributes:
        gamma: the fixed draft length, or ``auto``.
        cost: c.
        limit: the largest gamma that ``auto`` may choose.
    """

    gamma: int | str
    cost: float = 0.3
    limit: int = 8
    decay: float = 0.98
    # A weak prior of three accepted tokens in four keeps the first choices moderate.
    _accepted: float = 3.0
    _decided: float = 4.0

    @property
    def largest(self) -> int:
        """The largest gamma that :meth:`choose` may return."""
        return self.limit if self.gamma == AUTO else int(self.gamma)

    @property
    def rate(self) -> float:
        """The acceptance rate of a proposed token, given that those before it were accepted."""
        return self._accepted / self._decided

    def choose(self) -> int:
        """The gamma of the next round."""
        if self.gamma != AUTO:
            return int(self.gamma)
        return max(range(1, self.limit + 1), key=self._yield)

    def observe(self, accepted: int, proposed: int) -> None:
        """Learn from a round of one request: the first rejection decides one token, the rest stay unknown."""
        self._accepted = self._accepted * self.decay + accepted
        self._decided = self._decided * self.decay + accepted + (accepted < proposed)

    def _yield(self, gamma: int) -> float:
        expected = sum(self.rate**i for i in range(gamma + 1))
        return expected / (1 + gamma * self.cost)
