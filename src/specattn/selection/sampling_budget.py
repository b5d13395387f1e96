"""How many draws keep an estimated sum, or a ratio of two, within a relative error: the central limit theorem.

``b`` draws from ``n`` terms with standard deviation ``s`` estimate their sum with the standard deviation
``n s / sqrt(b)``. A relative spread is that figure for one draw, divided by the sum in question.
"""

from __future__ import annotations

from statistics import NormalDist

from torch import Tensor


def draws_for_sum(spread: Tensor, eps: float, delta: float) -> Tensor:
    """Draws with replacement after which a sum's relative error exceeds ``eps`` with probability ``delta`` at most.

    Two-sided. It holds for sums of vectors too, with the trace of the covariance for the variance, if ``delta`` is
    below 0.215: of all Gaussian vectors with the same trace, those on a line have the heaviest tail there (Szekely and
    Bakirov 2003). Float64, not rounded, infinite where ``spread`` is.
    """
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    return (spread.double() * (quantile / eps)) ** 2


def draws_for_ratio(numerator: Tensor, denominator: Tensor, eps: float, delta: float) -> Tensor:
    """Draws after which the ratio of two sums has a relative error above ``eps`` with probability ``delta`` at most.

    If the sums' relative errors are at most ``e`` and ``f``, the ratio's is at most ``(e + f) / (1 - f)``, which is
    ``eps`` where ``e + (1 + eps) f = eps``. Either sum may fail with probability ``delta / 2``. Of all such ``e`` and
    ``f``, those in proportion to the spreads need the fewest draws, and the same number for both sums: the draws for
    one sum whose spread is ``numerator + (1 + eps) denominator``.
    """
    return draws_for_sum(numerator + (1 + eps) * denominator, eps, delta / 2)


def without_repetition(draws: Tensor, size: Tensor) -> Tensor:
    """Draws without replacement from ``size`` terms that are worth ``draws`` with replacement.

    The variance of a sum falls by the factor ``1 - b / size``: ``1 / b = 1 / draws + 1 / size``.
    """
    return size / (1 + size / draws)
