"""The size of a sample: against the normal distribution, an exhaustive search and the worst case of a ratio."""

from __future__ import annotations

import math

import pytest
import torch

from specattn.selection.sampling_budget import draws_for_ratio, draws_for_sum, without_repetition


def tail(z: float) -> float:
    """Probability that a standard normal number is beyond ``z`` on either side."""
    return math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("delta", [0.4, 0.1, 0.05, 0.001])
@pytest.mark.parametrize("eps", [0.3, 0.05])
def test_a_normal_error_is_beyond_eps_with_probability_delta(eps, delta):
    spread = torch.tensor([0.2, 3.0])
    draws = draws_for_sum(spread, eps, delta)
    for each, b in zip(spread.tolist(), draws.tolist(), strict=True):
        assert tail(eps / (each / math.sqrt(b))) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("delta", [0.2, 0.05, 0.001])
def test_the_trace_bounds_vectors_of_any_number_of_equal_channels(delta):
    """The squared error of n channels with the trace's n-th part each is chi-square with n degrees, over n."""
    z_squared = draws_for_sum(torch.tensor(1.0), 1.0, delta)
    n = torch.arange(1, 65, dtype=torch.float64)
    exceeded = torch.special.gammaincc(n / 2, n * z_squared / 2)
    assert exceeded[0] == pytest.approx(delta)
    assert (exceeded[1:] < delta).all()


def test_the_trace_does_not_bound_vectors_above_the_documented_delta():
    z_squared = draws_for_sum(torch.tensor(1.0), 1.0, 0.22)
    assert math.exp(-z_squared) > 0.22  # two equal channels


@pytest.mark.parametrize("eps", [0.9, 0.2, 0.05])
@pytest.mark.parametrize("numerator,denominator", [(1.0, 1.0), (4.0, 0.3), (0.1, 2.0), (1.0, 0.0)])
def test_the_ratios_tolerance_is_split_in_the_best_way(numerator, denominator, eps):
    """Every split whose worst ratio is within eps needs as many draws or more."""
    found = float(draws_for_ratio(torch.tensor(numerator), torch.tensor(denominator), eps, 0.1))
    f = eps / (1 + eps) * torch.arange(1, 20000, dtype=torch.float64) / 20000
    e = eps * (1 - f) - f
    assert torch.allclose((1 + e) / (1 - f) - 1, torch.tensor(eps).double()), (
        "the worst ratio of 1 + e and 1 - f"
    )
    needs = [
        draws_for_sum(torch.tensor(numerator) / e, 1, 0.05),
        draws_for_sum(torch.tensor(denominator) / f, 1, 0.05),
    ]
    best = float(torch.maximum(*needs).min())
    assert found <= best * (1 + 1e-9)
    assert found == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("eps", [0.9, 0.2])
def test_no_errors_within_the_split_move_the_ratio_further(eps):
    """Any error of the numerator, a vector, and of the denominator, on a grid of directions and sizes."""
    f = 0.3 * eps / (1 + eps)
    e = eps * (1 - f) - f
    angle = torch.linspace(0, math.tau, 181, dtype=torch.float64)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    numerator = torch.tensor([1.0, 0.0], dtype=torch.float64)
    worst = 0.0
    for share in torch.linspace(-1, 1, 41, dtype=torch.float64):
        ratio = (numerator + e * direction) / (1 + share * f)
        worst = max(worst, float((ratio - numerator).norm(dim=-1).max()))
    assert worst == pytest.approx(eps)


def test_draws_without_replacement_are_worth_more():
    draws, size = torch.tensor([10.0, 100.0, 1e4, math.inf, 0.0], dtype=torch.float64), torch.tensor(100)
    fewer = without_repetition(draws, size)
    # The variance of a mean of b of n terms is s**2 / b * (1 - b / n).
    torch.testing.assert_close((1 / fewer * (1 - fewer / size))[:4], 1 / draws[:4])
    assert fewer.tolist()[3:] == [100.0, 0.0]
    assert without_repetition(torch.tensor(5.0), torch.tensor(0)) == 0
