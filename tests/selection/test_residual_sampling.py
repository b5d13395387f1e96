"""Samples of the residual: who is drawn how often, and what the lists that carry them estimate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from specattn.sampling import uniform
from specattn.selection.residual_sampling import with_replacement, without_replacement
from specattn.selection.weighted_lists import weighted_list

TRIALS = 4000
SAMPLERS = [without_replacement, with_replacement]


def numbers(trials: int, length: int, seed: int = 0) -> Tensor:
    """Uniform numbers ``[trials, 1, length]``: every trial is a request of its own."""
    return uniform(torch.arange(trials) + seed * trials, torch.arange(length)[None, None])


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test of counts that add up to a fixed total."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def residual(length: int, *tokens: int) -> Tensor:
    """The mask ``[1, 1, length]`` of all tokens but ``tokens``."""
    mask = torch.ones(1, 1, length, dtype=torch.bool)
    mask[..., list(tokens)] = False
    return mask


def test_every_set_of_a_size_is_drawn_equally_often():
    mask = residual(7, 0, 4).expand(TRIALS, -1, -1)
    times = without_replacement(mask, torch.full((TRIALS, 1), 2), numbers(TRIALS, 7))
    sets = [tuple(row.nonzero()[:, 0].tolist()) for row in times[:, 0]]
    wanted = list(itertools.combinations([1, 2, 3, 5, 6], 2))
    assert set(sets) == set(wanted)
    counts = torch.tensor([sets.count(each) for each in wanted])
    assert p_value(counts, torch.full((10,), TRIALS / 10)) > 1e-4


def test_draws_with_replacement_are_independent_of_each_other():
    mask = residual(5, 3).expand(TRIALS, -1, -1)
    times = with_replacement(mask, torch.full((TRIALS, 1), 3), numbers(TRIALS, 5))[:, 0]
    assert (times[:, 3] == 0).all() and (times.sum(-1) == 3).all()
    wanted = [row for row in itertools.product(range(4), repeat=4) if sum(row) == 3]
    ways = torch.tensor([math.factorial(3) / math.prod(map(math.factorial, row)) for row in wanted])
    drawn = [tuple(row) for row in times[:, [0, 1, 2, 4]].tolist()]
    counts = torch.tensor([drawn.count(row) for row in wanted])
    assert p_value(counts, ways * TRIALS / 4**3) > 1e-4


@pytest.mark.parametrize("draw", SAMPLERS)
def test_counts_differ_between_lists_and_may_be_nothing_or_everything(draw):
    mask = residual(9, 2, 8).repeat(2, 2, 1)
    mask[1, 1] = False
    count = torch.tensor([[0, 7], [3, 0]])
    times = draw(mask, count, numbers(2, 9).expand(-1, 2, -1))
    assert times.dtype == torch.int32
    assert torch.equal(times.sum(-1), count)
    assert (times[~mask] == 0).all()
    assert torch.equal(times[0, 1], mask[0, 1].int()), "as many draws as tokens: each of them once"


@pytest.mark.parametrize("draw", SAMPLERS)
def test_longer_neighbours_do_not_change_a_sample(draw):
    mask, drawn = residual(20, 0, 5), numbers(1, 30)
    padded = torch.nn.functional.pad(mask, (0, 10))
    alone = draw(mask, torch.tensor([[6]]), drawn[..., :20])
    together = draw(padded, torch.tensor([[6]]), drawn)
    assert torch.equal(alone, together[..., :20]) and (together[..., 20:] == 0).all()


@pytest.mark.parametrize("draw", SAMPLERS)
def test_sums_over_weighted_lists_are_unbiased(draw):
    """Three exact tokens, nine of forty others: weighted sums of skewed terms, over many samples."""
    length, count = 43, 9
    mask = residual(length, 0, 1, 42).expand(TRIALS, -1, -1)
    times = draw(mask, torch.full((TRIALS, 1), count), numbers(TRIALS, length, seed=1))
    selection = weighted_list(~mask, times, torch.tensor(count / 40))
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(length, 3, generator=generator, dtype=torch.float64).exp() - 0.5
    weights = selection.log_weights[:, 0].double().exp() * (selection.indices[:, 0] >= 0)
    sums = (weights[..., None] * terms[selection.indices[:, 0].clamp(min=0).long()]).sum(1)
    error = (sums.mean(0) - terms.sum(0)) / (sums.std(0) / TRIALS**0.5)
    assert error.abs().max() < 4.5  # standard errors
    assert (sums.std(0) > 1).all()


def test_weights_stand_beside_their_tokens():
    exact = torch.tensor([[[True, False, False, True, False, False]]])
    times = torch.tensor([[[0, 2, 0, 0, 0, 1]]])
    expected = torch.tensor([[[0.5, 0.5, 0.5, 0.5, 0.5, 0.25]]])
    selection = weighted_list(exact, times, expected)
    assert selection.indices.tolist() == [[[0, 1, 3, 5, -1, -1]]]
    assert selection.counts.tolist() == [[4]]
    wanted = [0, math.log(2 / 0.5), 0, math.log(1 / 0.25), 0, 0]
    torch.testing.assert_close(selection.log_weights, torch.tensor([[wanted]]))


def test_a_token_that_is_certain_to_be_drawn_weighs_one_exactly():
    exact = torch.zeros(1, 1, 5, dtype=torch.bool)
    selection = weighted_list(
        exact, torch.ones(1, 1, 5, dtype=torch.int32), torch.tensor(7) / torch.tensor(7)
    )
    assert selection.log_weights.tolist() == [[[0.0] * 5]]
