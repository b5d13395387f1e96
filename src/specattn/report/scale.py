"""Axes: from figures to places on a picture, and where their ticks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COARSE, FINE = (1, 2, 5), (1, 1.5, 2, 3, 5, 7)
"""Leading figures of the ticks; the fine ones where the coarse ones leave an axis almost bare."""

FEWEST = 4


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from ``low`` to ``high``, drawn between the places ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a positive figure."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round figures within the axis."""
        coarse = self._ticks(COARSE)
        return coarse if len(coarse) >= FEWEST else self._ticks(FINE)

    def _ticks(self, leading: Sequence[float]) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [float(f"{figure}e{power}") for power in powers for figure in leading]
        return [tick for tick in found if self.low <= tick <= self.high]


def log_scale(values: Sequence[float], start: float, end: float) -> LogScale:
    """An axis that holds the positive ``values``, with a little air at both ends."""
    low, high = min(values), max(values)
    air = (high / low) ** 0.04 if high > low else 1.5
    return LogScale(low / air, high * air, start, end)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the given ones, in their order, ``gap`` apart and between ``low`` and ``high``.

    For labels beside the ends of lines. If there is no room for the gap, it becomes smaller.
    """
    if len(places) > 1:
        gap = min(gap, (high - low) / (len(places) - 1))
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = list(places)
    floor = low
    for number in order:
        moved[number] = floor = max(places[number], floor)
        floor += gap
    ceiling = high
    for number in reversed(order):
        moved[number] = ceiling = min(moved[number], ceiling)
        ceiling -= gap
    return moved
