"""gamma: what is refused, and an acceptance rate learned from censored rounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specattn.errors import UsageError
from specattn.gamma import LARGEST_GAMMA, Acceptance, check_gamma
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


@given(st.floats(0.01, 0.99), st.integers(0, 12))
def test_expected_tokens(rate, gamma):
    """By summing over where the first rejection falls."""
    expected = sum((accepted + 1) * rate**accepted * (1 - rate) for accepted in range(gamma))
    acceptance = Acceptance(_accepted=rate * 1e6, _decided=1e6)
    assert acceptance.tokens(gamma) == pytest.approx(expected + (gamma + 1) * rate**gamma)


@pytest.mark.parametrize("gamma", [1, 4, 8])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
def test_the_estimate_converges_to_the_true_rate(rate, gamma):
    """What lies behind the first rejection is never seen; counting it either way would show as a bias."""
    generator = random.Random(7)
    acceptance = Acceptance(decay=0.9995)
    for _ in range(20_000):
        acceptance.observe(simulated_round(rate, gamma, generator), gamma)
    assert acceptance.rate == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_estimate_does_not_depend_on_the_length_of_the_rounds(rate):
    """Accepted over proposed would: it falls as rounds get longer."""
    generator = random.Random(3)
    acceptance = Acceptance(decay=0.9995)
    for number in range(20_000):
        gamma = (1, 8)[number % 2]
        acceptance.observe(simulated_round(rate, gamma, generator), gamma)
    assert acceptance.rate == pytest.approx(rate, abs=0.03)


def test_the_default_decay_follows_a_change():
    generator = random.Random(1)
    acceptance = Acceptance()
    assert acceptance.rate == 0.75
    for rate in (0.95, 0.2):
        for _ in range(600):
            acceptance.observe(simulated_round(rate, 8, generator), 8)
        assert acceptance.rate == pytest.approx(rate, abs=0.08)


def test_a_rate_of_one_is_no_trouble():
    acceptance = Acceptance()
    for _ in range(5000):
        acceptance.observe(5, 5)
    assert 0.999 < acceptance.rate <= 1
    assert acceptance.tokens(5) == pytest.approx(6, rel=1e-3)


def test_hope_shrinks_with_what_is_known():
    acceptance = Acceptance()
    assert acceptance.hope > acceptance.rate + 0.15
    for _ in range(300):
        acceptance.observe(1, 2)
    known = acceptance.rate
    assert known == pytest.approx(0.5, abs=0.01)
    assert acceptance.hope == known
    for _ in range(1000):
        acceptance.fade()
    assert acceptance.hope > acceptance.rate + 0.1 > known + 0.1
