"""A timer for the CPU: everything runs, as often as it is asked for, and the times are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TIMES = {"plain": 4.0, "dense": 8.0, "sparse": 5.0}
DRAFT = {"dense": 2.0, "sparse": 2.5}
SELECTION = 0.25


@dataclass
class HostTimer:
    """Answers with :data:`TIMES` for rounds, and with the other figures for parts of them."""

    repeats: int = 6

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        return run

    def once(self, run: Callable[[], Any]) -> tuple[Any, float]:
        return run(), TIMES[mode(run)]

    def median_ms(self, run: Callable[[], Any]) -> float:
        run()
        if run.__name__ == "propose":
            return DRAFT[mode(run)]
        return SELECTION if run.__name__ == "select" else TIMES[mode(run)]


def mode(run: Any) -> str:
    """The mode of the round that ``run`` is a method of."""
    round = getattr(run.__self__, "round", run.__self__)
    return "sparse" if round.selector else "dense" if round.gamma else "plain"
