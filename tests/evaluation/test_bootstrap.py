"""Bootstrap intervals against what is known of means."""

from __future__ import annotations

import math

import numpy
import pytest

from specattn.evaluation.bootstrap import interval


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = numpy.random.default_rng(1).normal(5, 2, size=400)
    low, high = interval([values])
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_groups_count_alike_whatever_their_size() -> None:
    random = numpy.random.default_rng(2)
    large, small = random.normal(0, 1, size=900), random.normal(10, 1, size=100)
    low, high = interval([large, small])
    middle = (large.mean() + small.mean()) / 2
    error = math.sqrt(large.var() / 900 + small.var() / 100) / 2
    assert low == pytest.approx(middle - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.15 * error)


def test_equal_values_have_no_width_and_single_ones_no_interval() -> None:
    assert interval([[0.25] * 9]) == (0.25, 0.25)
    assert interval([[0.25], [0.5]]) is None
    assert interval([]) is None


def test_the_same_values_have_the_same_interval() -> None:
    values = numpy.random.default_rng(3).normal(size=50)
    assert interval([values]) == interval([values]) != interval([values], seed=1)
