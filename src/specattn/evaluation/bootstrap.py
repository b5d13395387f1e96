"""Confidence intervals by resampling (the percentile bootstrap of Efron and Tibshirani 1993, section 13.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

RESAMPLES, LEVEL = 2000, 0.95


def interval(groups: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the mean of the groups' means.

    Values are drawn anew within each group; groups are taken to be given. The same values have the same interval.

    Returns:
        Its two ends; ``None`` where no group has two values, so that nothing is known of how they spread.
    """
    if all(len(group) < 2 for group in groups):
        return None
    random = numpy.random.default_rng(seed)
    means = numpy.mean([_resampled(numpy.asarray(group, dtype=float), random) for group in groups], axis=0)
    low, high = numpy.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(values: numpy.ndarray, random: numpy.random.Generator) -> numpy.ndarray:
    """Means ``[RESAMPLES]`` of as many values drawn with replacement."""
    means = numpy.empty(RESAMPLES)
    for index in range(RESAMPLES):
        means[index] = values[random.integers(len(values), size=len(values))].mean()
    return means
