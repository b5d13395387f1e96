"""The draft-weighted tail against loop-style readings of its definitions, and what it estimates on average."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.sampling import uniform
from specattn.selection.base import RoundState
from specattn.selection.registry import get_method, parse_method
from specattn.selection.weighted_tail import (
    UNIT,
    add_tail,
    comb_shift,
    inclusion,
    proposal,
    systematic,
    with_tail,
)

masses = st.lists(st.sampled_from([1e-9, 1e-4, 0.01, 0.1, 0.1, 1.0, 1.0, 7.0]), min_size=1, max_size=24)


def by_hand(weights: list[Fraction], count: int) -> list[Fraction]:
    """Certain tokens are taken out one at a time, the heaviest first."""
    if count >= len(weights):
        return [Fraction(1)] * len(weights)
    certain: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in certain]
        left = sum(weights[i] for i in rest)
        heaviest = max(rest, key=lambda i: weights[i])
        if (count - len(certain)) * weights[heaviest] <= left:
            return [
                Fraction(1) if i in certain else (count - len(certain)) * weights[i] / left
                for i in range(len(weights))
            ]
        certain.add(heaviest)


@settings(max_examples=80)
@given(masses, st.integers(1, 26))
def test_probabilities_are_proportional_at_most_1_and_add_up_to_the_count(masses, count):
    expected = by_hand([Fraction(mass) for mass in masses], count)
    found = inclusion(torch.tensor([masses], dtype=torch.float64), torch.tensor([count]))[0]
    assert found.tolist() == pytest.approx([float(each) for each in expected], rel=1e-9)
    assert float(found.sum()) == pytest.approx(min(count, len(masses)))


def test_a_token_without_a_weight_is_never_drawn_and_takes_no_place():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    assert inclusion(weights, torch.tensor([2]))[0].tolist() == [0, 1, 0, 0.5, 0.5, 0]
    assert inclusion(weights, torch.tensor([5]))[0].tolist() == [0, 1, 0, 1, 1, 0]
    assert inclusion(0 * weights, torch.tensor([5]))[0].tolist() == [0] * 6


@settings(max_examples=50)
@given(st.lists(st.integers(0, UNIT), min_size=1, max_size=20), st.integers(0, UNIT - 1))
def test_every_token_that_a_tooth_of_the_comb_hits_is_drawn(widths, shift):
    probability = torch.tensor([widths], dtype=torch.float64) / UNIT
    drawn, given = systematic(probability, torch.tensor([shift]))
    begin = 0
    for token, width in enumerate(widths):
        hit = any(begin <= shift + tooth * UNIT < begin + width for tooth in range(len(widths) + 1))
        assert int(drawn[0, token]) == hit
        assert float(given[0, token]) == width / UNIT
        begin += width


def test_a_probability_too_small_to_be_told_from_0_is_not_0():
    drawn, given = systematic(torch.tensor([[1e-30, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert given[0].tolist() == [1 / UNIT, 0] and drawn[0].tolist() == [1, 0]


def test_shifts_are_even_over_their_range_down_to_the_last_bits():
    numbers = uniform(torch.tensor([3]), torch.arange(2 * 40_000)[None]).view(40_000, 2)
    shift = comb_shift(numbers)
    assert shift.min() >= 0 and shift.max() < UNIT
    for bit in range(40):
        assert abs(float((shift >> bit & 1).double().mean()) - 0.5) < 0.0125, "five standard errors"


@pytest.mark.parametrize("a", [0.01, 0.2, 1.0])
def test_the_proposal_mixes_the_draft_with_a_uniform_share(a):
    density = torch.tensor([[3.0, 1.0, float("nan"), -2.0, 5.0, float("inf")]])
    residual = torch.tensor([[True, True, True, True, False, True]])
    found = proposal(density, residual, a)[0].tolist()
    expected = [(1 - a) * share + a / 5 for share in (0.75, 0.25, 0, 0)] + [0, a / 5]
    assert found == pytest.approx(expected)
    nothing = proposal(0 * density, residual, a)[0].tolist()
    assert nothing == pytest.approx([0.2, 0.2, 0.2, 0.2, 0, 0.2])


def draws(exact: Tensor, weights: Tensor, count: int, trials: int = 4000):
    """One list a trial, as masks and weights ``[trials, length]``."""
    numbers = uniform(torch.tensor([11]), torch.arange(2 * trials)[None]).view(trials, 2)
    lists = with_tail(exact.expand(trials, -1), weights.expand(trials, -1), torch.tensor(count), numbers)
    assert lists.log_weights is not None
    factors = torch.zeros(trials, len(exact) + 1, dtype=torch.float64)
    column = torch.where(lists.indices < 0, len(exact), lists.indices).long()
    factors.scatter_(-1, column, lists.log_weights.double().exp())
    return lists.counts, factors[:, :-1]


def test_every_token_counts_once_on_average_and_the_heavy_ones_in_every_sample():
    generator = torch.Generator().manual_seed(1)
    density = torch.rand(60, generator=generator) ** 6
    density[[7, 31]] = 9.0
    exact = torch.zeros(60, dtype=torch.bool)
    exact[[0, 1, 59]] = True
    counts, factors = draws(exact, proposal(density, ~exact, 0.2), 12)
    assert set((counts - 3).tolist()) <= {11, 12}
    assert (factors[:, [0, 1, 59]] == 1).all()
    assert (factors[:, [7, 31]] - 1).abs().max() < 1e-6, "certain"
    error = factors.std(0) / len(factors) ** 0.5
    assert ((factors.mean(0) - 1).abs() <= 4.5 * error + 1e-6).all()
    assert (factors.mean(0) > 0.5).all(), "every token is drawn sometimes"
    # An estimated sum of terms in proportion to the weights hardly varies.
    terms = 0.8 * density.double() / density[~exact].sum() + 0.2 / 57
    sums = factors[:, ~exact] @ terms[~exact]
    assert float(sums.std() / sums.mean()) < 0.06
    even = draws(exact, proposal(density, ~exact, 1.0), 12)[1][:, ~exact] @ terms[~exact]
    assert float(even.std() / even.mean()) > 10 * float(sums.std() / sums.mean())


def round_of(starts: list[int], length: int) -> RoundState:
    return RoundState(torch.tensor(starts, dtype=torch.int32), 3, length, 2, 2, 4)


@pytest.mark.parametrize("tail,drawn", [(0.1, [5, 3]), (7, [7, 7]), (1.0, [45, 25])])
def test_a_round_draws_as_many_as_the_tail_says_from_what_all_rows_see(tail, drawn):
    state = round_of([50, 30], 53)
    generator = torch.Generator().manual_seed(2)
    density = torch.rand(2, 2, 2, 53, generator=generator)
    position = torch.arange(53)
    recent = (position >= state.starts[:, None]) & (position < state.lengths[:, None])
    exact = ((position < 5) | recent)[:, None, None].expand(-1, 2, 2, -1)
    lists = add_tail(state, exact, density, tail, 0.3, seed=4)
    assert (lists.counts - 8 - torch.tensor(drawn)[:, None, None]).max() <= 0
    assert (lists.counts - 8 - torch.tensor(drawn)[:, None, None]).min() >= -1
    assert (lists.indices.amax(-1) == (state.lengths - 1)[:, None, None]).all()
    assert lists.log_weights is not None and (lists.log_weights[lists.indices < 0] == 0).all()
    again = add_tail(state, exact, density, tail, 0.3, seed=4)
    assert torch.equal(again.indices, lists.indices) and torch.equal(again.log_weights, lists.log_weights)
    if tail < 1:
        other = add_tail(state, exact, density, tail, 0.3, seed=5)
        assert not torch.equal(other.indices, lists.indices)
        assert not torch.equal(lists.indices[0, 0, 0], lists.indices[0, 0, 1]), "each head its own"


def test_neighbours_and_room_behind_the_text_change_nothing():
    density = torch.rand(1, 2, 1, 60, generator=torch.Generator().manual_seed(3))
    exact = torch.zeros(1, 2, 2, 60, dtype=torch.bool)
    exact[..., 30:33] = True
    alone = add_tail(round_of([30], 33), exact[..., :33], density[..., :33], 6, 0.2, 0)
    density[..., 33:] = float("nan")
    padded = add_tail(
        round_of([57, 30], 60), exact.expand(2, -1, -1, -1), density.expand(2, -1, -1, -1), 6, 0.2, 0
    )
    assert torch.equal(padded.indices[1, ..., :33], alone.indices[0])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tail": -0.1}, "tail=-0.1"),
        ({"tail": 1.5}, "tail=1.5"),
        ({"tail": float("nan")}, "tail=nan"),
        ({"tail": 0.1, "a": 0}, "a=0 is outside"),
        ({"tail": 0.1, "a": 1.1}, "use for example a=0.2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("specattn", **options)


@pytest.mark.parametrize("wrapper", ["twilight", "vattention"])
def test_a_list_with_weights_cannot_be_wrapped(wrapper):
    with pytest.raises(UsageError, match="returns no plain lists"):
        parse_method(f"{wrapper}:base=(specattn:tail=0.05)")
