"""After how many tokens the lossless mode verifies densely: a number, or as many as pay."""

from __future__ import annotations

from dataclasses import dataclass

from specattn.errors import UsageError

AUTO = "auto"

LARGEST_EVERY = 64
"""The most tokens that may wait for a dense pass: a request reserves cache for them."""


def check_every(every: int | str) -> None:
    """Refuse what is neither a number from 1 to :data:`LARGEST_EVERY` nor ``auto``.

    Raises:
        UsageError: naming the value.
    """
    if every == AUTO:
        return
    if not isinstance(every, int) or isinstance(every, bool) or not 1 <= every <= LARGEST_EVERY:
        raise UsageError(
            f"lossless_every={every!r} must be a whole number of at least 1 and at most {LARGEST_EVERY}, or {AUTO!r}"
        )


@dataclass
class EveryPolicy:
    """Chooses n, the tokens a dense pass, from their measured acceptance rate a and cost c in dense passes.

    A cycle of n tokens costs ``1 + n c`` and delivers ``(1 - a^n) / (1 - a)`` of them: those before the first that the
    dense pass corrects, and the correction. The n with the best ratio is used. Both figures forget old cycles.

    Attributes:
        every: the fixed n, or ``auto``.
        limit: the largest n that ``auto`` may choose.
        cost: c; until it is measured, that of a target that reads a sixth and yields three tokens a round.
    """

    every: int | str = AUTO
    limit: int = 32
    cost: float = 0.1
    decay: float = 0.95
    # A weak prior of nine accepted tokens in ten: the first cycles are moderate.
    _accepted: float = 9.0
    _decided: float = 10.0

    @property
    def largest(self) -> int:
        """The largest n that :meth:`choose` may return."""
        return self.limit if self.every == AUTO else int(self.every)

    @property
    def rate(self) -> float:
        """The acceptance rate of a token in a dense pass, given that those before it were accepted."""
        return self._accepted / self._decided

    def choose(self) -> int:
        """The n of the next cycle."""
        if self.every != AUTO:
            return int(self.every)
        return max(range(1, self.limit + 1), key=self._yield)

    def observe(self, accepted: int, proposed: int) -> None:
        """Learn from a dense pass over one request's tokens: the first rejection decides one, the rest stay unknown."""
        self._accepted = self._accepted * self.decay + accepted
        self._decided = self._decided * self.decay + accepted + (accepted < proposed)

    def observe_cost(self, token: float, dense_pass: float) -> None:
        """Learn what a token cost in sparse rounds, and what the dense pass cost, both in bytes."""
        self.cost = self.decay * self.cost + (1 - self.decay) * token / dense_pass

    def _yield(self, every: int) -> float:
        expected = sum(self.rate**i for i in range(every))
        return expected / (1 + every * self.cost)
