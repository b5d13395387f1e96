"""The choice of gamma: what is refused, the best ratio, and an acceptance rate learned from censored rounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specattn.errors import UsageError
from specattn.gamma import LARGEST_GAMMA, GammaPolicy, check_gamma
from specattn.speculation import DRAWS_A_ROUND


@pytest.mark.parametrize("gamma", [0, -1, 2.0, 1.5, "4", "fast", "", None, True, LARGEST_GAMMA + 1])
def test_refusals_name_the_value(gamma):
    with pytest.raises(UsageError, match=f"gamma={gamma!r} "):
        check_gamma(gamma)


@pytest.mark.parametrize("gamma", [1, 4, LARGEST_GAMMA, "auto"])
def test_numbers_and_auto_are_accepted(gamma):
    check_gamma(gamma)


def test_the_longest_round_does_not_run_out_of_random_numbers():
    assert LARGEST_GAMMA <= DRAWS_A_ROUND


def simulated_round(rate: float, gamma: int, generator: random.Random) -> int:
    """Draft tokens accepted: each with probability ``rate``, up to the first rejection."""
    accepted = 0
    while accepted < gamma and generator.random() < rate:
        accepted += 1
    return accepted


def policy_at(rate: float, **options) -> GammaPolicy:
    """A policy whose estimate is ``rate``."""
    return GammaPolicy("auto", _accepted=rate * 1e6, _decided=1e6, **options)


def tokens_a_cost(rate: float, cost: float, gamma: int) -> float:
    """Expected tokens of a round over its cost, by summing over where the first rejection falls."""
    expected = sum((accepted + 1) * rate**accepted * (1 - rate) for accepted in range(gamma))
    return (expected + (gamma + 1) * rate**gamma) / (1 + gamma * cost)


@given(st.floats(0.01, 0.99), st.floats(0.01, 1.5), st.integers(1, 12))
def test_auto_takes_the_best_of_all_lengths(rate, cost, limit):
    chosen = policy_at(rate, cost=cost, limit=limit).choose()
    best = max(tokens_a_cost(rate, cost, gamma) for gamma in range(1, limit + 1))
    assert 1 <= chosen <= limit
    assert tokens_a_cost(rate, cost, chosen) == pytest.approx(best, rel=1e-9)


def test_cheap_drafts_that_are_often_right_get_long_rounds():
    assert policy_at(0.95, cost=0.02).choose() == 8
    assert policy_at(0.1, cost=0.5).choose() == 1
    assert 1 < policy_at(0.7, cost=0.15).choose() < 8


@pytest.mark.parametrize("gamma", [1, 4, 8])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
def test_the_estimate_converges_to_the_true_rate(rate, gamma):
    """What lies behind the first rejection is never seen; counting it either way would show as a bias."""
    generator = random.Random(7)
    policy = GammaPolicy(gamma, decay=0.9995)
    for _ in range(20_000):
        policy.observe(simulated_round(rate, gamma, generator), gamma)
    assert policy.rate == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_estimate_does_not_depend_on_the_length_of_the_rounds(rate):
    """Accepted over proposed would: it falls as rounds get longer."""
    generator = random.Random(3)
    policy = GammaPolicy("auto", decay=0.9995)
    for number in range(20_000):
        gamma = (1, 8)[number % 2]
        policy.observe(simulated_round(rate, gamma, generator), gamma)
    assert policy.rate == pytest.approx(rate, abs=0.03)


def test_the_default_decay_follows_a_change():
    generator = random.Random(1)
    policy = GammaPolicy("auto", cost=0.1)
    assert policy.rate == 0.75
    for _ in range(300):
        policy.observe(simulated_round(0.95, 8, generator), 8)
    assert policy.choose() > 5
    for _ in range(300):
        policy.observe(simulated_round(0.2, 8, generator), 8)
    assert policy.choose() <= 2


def test_a_rate_of_one_is_no_trouble():
    policy = GammaPolicy("auto", limit=5)
    for _ in range(5000):
        policy.observe(5, 5)
    assert 0.999 < policy.rate <= 1
    assert policy.choose() == policy.largest == 5


def test_a_fixed_gamma_never_changes():
    policy = GammaPolicy(3, cost=5.0)
    for accepted in (0, 0, 0, 3, 1):
        assert policy.choose() == policy.largest == 3
        policy.observe(accepted, 3)
    assert GammaPolicy("auto").largest == 8
