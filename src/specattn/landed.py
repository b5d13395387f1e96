"""A round that has come back to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Landed:
    """What a round produced, for each of its requests.

    Attributes:
        tokens: those that count, accepted ones and the one behind them.
        reads: bytes since the request began: the target's, its full reads, the draft's.
        seconds: time that the round took.
    """

    tokens: Sequence[Sequence[int]]
    reads: Sequence[Sequence[float]]
    seconds: float
