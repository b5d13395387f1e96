"""The sorting-free nucleus and top-k against a plain sort in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus import nucleus, top_k

Row = list[float]
Rows = list[Row]

NAN = float("nan")
SLACK = Fraction(1, 10**12)  # far above float64's rounding of a sum, far below what a weight is worth


def full(weights: Tensor) -> Tensor:
    return torch.full(weights.shape[:1], weights.shape[-1])


def ranking(row: Row, forced: set[int]) -> list[int]:
    """The positions that are not forced, heaviest first, of equals the most recent first."""
    return sorted(set(range(len(row))) - forced, key=lambda i: (-row[i], -i))


def forced_in(row: Row, sink: int, recent: int) -> set[int]:
    return {i for i in range(len(row)) if i < sink or i >= len(row) - recent}


def sorted_nucleus(row: Row, p: float | Fraction, sink: int = 0, recent: int = 0) -> set[int]:
    exact = [Fraction(weight) for weight in row]
    if p >= 1 or sum(exact) == 0:
        return set(range(len(row)))
    chosen = forced_in(row, sink, recent)
    missing = Fraction(p) * sum(exact) - sum(exact[i] for i in chosen)
    for i in ranking(row, chosen):
        if missing <= 0:
            break
        chosen.add(i)
        missing -= exact[i]
    return chosen


def sorted_top_k(row: Row, k: int, sink: int, recent: int) -> set[int]:
    forced = forced_in(row, sink, recent)
    return forced | set(ranking(row, forced)[: max(0, k - len(forced))])


def positions(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def kept(row: Row, p: float, sink: int = 0, recent: int = 0) -> set[int]:
    weights = torch.tensor([row])
    return positions(nucleus(weights, p, full(weights), sink=sink, recent=recent)[0])


def check_against_sort(row: Row, p: float, sink: int = 0, recent: int = 0) -> set[int]:
    """The nucleus lies between the sorted ones of p a hair smaller and a hair larger."""
    got = kept(row, p, sink, recent)
    assert sorted_nucleus(row, Fraction(p) * (1 - SLACK), sink, recent) <= got
    assert got <= sorted_nucleus(row, Fraction(p) * (1 + SLACK), sink, recent)
    return got


small = st.integers(0, 24)
# Sums of these are exact in float64: the result must equal the sorted one, ties and all.
dyadic = st.builds(lambda digits, exponent: digits * 2.0**exponent, st.integers(0, 7), st.integers(-20, 0))
any_weight = st.floats(0, 2.0**100, width=32, allow_subnormal=True)


def rows_of(weight: st.SearchStrategy[float]) -> st.SearchStrategy[Rows]:
    return st.integers(1, 24).flatmap(
        lambda length: st.lists(st.lists(weight, min_size=length, max_size=length), min_size=1, max_size=4)
    )


@given(rows_of(dyadic), st.integers(1, 1024), small, st.integers(0, 4), st.integers(0, 4))
def test_equals_the_sorted_nucleus(rows: Rows, steps: int, short: int, sink: int, recent: int) -> None:
    p = steps / 1024
    lengths = [max(0, len(row) - short * index) for index, row in enumerate(rows)]
    mask = nucleus(torch.tensor(rows), p, torch.tensor(lengths), sink=sink, recent=recent)
    for row, length, got in zip(rows, lengths, mask, strict=True):
        assert positions(got) == sorted_nucleus(row[:length], p, sink, recent)


any_row = st.lists(any_weight, min_size=1, max_size=40)


@given(any_row, st.floats(0, 1, exclude_min=True), st.integers(0, 3), st.integers(0, 3))
def test_any_floats_and_any_p(row: Row, p: float, sink: int, recent: int) -> None:
    check_against_sort(row, p, sink, recent)


@given(rows_of(any_weight), small, small, st.integers(0, 4), st.integers(0, 4))
def test_top_k_equals_the_sorted_one(rows: Rows, k: int, short: int, sink: int, recent: int) -> None:
    lengths = [max(0, len(row) - short * index) for index, row in enumerate(rows)]
    mask = top_k(torch.tensor(rows), k, torch.tensor(lengths), sink=sink, recent=recent)
    for row, length, got in zip(rows, lengths, mask, strict=True):
        assert positions(got) == sorted_top_k(row[:length], k, sink, recent)


@given(any_row, st.floats(0, 1, exclude_min=True))
def test_mass_is_reached_and_the_set_minimal(row: Row, p: float) -> None:
    exact = [Fraction(weight) for weight in row]
    needed = Fraction(p) * sum(exact)
    got = kept(row, p, sink=1)
    mass = sum(exact[i] for i in got)
    assert mass >= needed * (1 - SLACK)
    if p < 1 and sum(exact) > 0 and got - {0}:
        assert mass - min(exact[i] for i in got - {0}) < needed * (1 + SLACK)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=40), st.integers(1, 63), st.integers(-149, 120))
def test_scaling_by_a_power_of_two_changes_nothing(row: list[int], steps: int, exponent: int) -> None:
    scaled = [weight * 2.0**exponent for weight in row]  # down to the denormal numbers
    assert kept(scaled, steps / 64) == kept([float(weight) for weight in row], steps / 64)


@given(st.integers(0, 2**31), st.floats(0.01, 1))
def test_permuting_a_row_permutes_its_mask(seed: int, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, 50, generator=generator)
    order = torch.randperm(50, generator=generator)
    mask = nucleus(weights, p, full(weights))
    assert torch.equal(nucleus(weights[:, order], p, full(weights)), mask[:, order])


@pytest.mark.parametrize("length", [1, 2, 10, 1000, 131_072])
@pytest.mark.parametrize("value", [1.0, 1e-3, 1e-38, 1e-45])
def test_a_flat_row_keeps_half_the_most_recent_first(length: int, value: float) -> None:
    assert kept([value] * length, 0.5) == set(range(length // 2, length))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_decimal_fractions_behave_as_written(p: float) -> None:
    assert len(kept([0.1] * 10, p)) == round(10 * p)


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 0.999, 0.999999])
@pytest.mark.parametrize("length", [1, 257, 4096, 131_072])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 8.0])
def test_long_rows_of_attention(length: int, temperature: float, p: float) -> None:
    torch.manual_seed(length)
    weights = torch.randn(2, length).mul(temperature).softmax(-1)
    mask = nucleus(weights, p, full(weights))
    reached = weights.double().sort(-1, descending=True).values.cumsum(-1) / weights.double().sum(-1, True)
    counts = mask.sum(-1) - 1
    assert ((reached < p - 1e-12).sum(-1) <= counts).all()
    assert ((reached < p + 1e-12).sum(-1) >= counts).all()
    # The heaviest ones, whichever: what is left out weighs no more than what is kept.
    inside, outside = weights.masked_fill(~mask, 2), weights.masked_fill(mask, 0)
    assert (inside.amin(-1) >= outside.amax(-1)).all()


def linear_bisection(row: Tensor, p: float, steps: int) -> Tensor:
    """What must not be done: halve [0, max] a fixed number of times, and emit with the lower end."""
    low, high = 0.0, row.max().item()
    for _ in range(steps):
        middle = (low + high) / 2
        if row[row >= middle].sum() >= p * row.sum():
            low = middle
        else:
            high = middle
    return row >= low


def test_a_strong_sink_does_not_select_everything() -> None:
    tail = torch.arange(1, 4096, dtype=torch.float64).pow(-1.1)
    row = torch.cat([torch.tensor([0.9]), 1e-3 * tail / tail.sum()]).float()
    p = 0.9995  # the sink and about half of the rest, all of it below 0.9 / 2**10
    assert linear_bisection(row, p, steps=10).all()
    got = check_against_sort(row.tolist(), p)
    assert 0 in got and len(got) < 1000


def test_one_weight_of_nearly_everything() -> None:
    row = [1e-6] * 500 + [0.999] + [1e-6] * 500
    assert kept(row, 0.99) == {500}
    assert kept(row, 0.9995) == set(range(500, 1001))
    assert len(check_against_sort(row, 0.9997)) > 600


def test_tiny_probabilities_beside_large_ones() -> None:
    row = [1e-45, 1.0, 1e-38, 0.0, 1e-30, 1e-38, -0.0, 1e-45]
    assert kept(row, 0.999) == {1}
    row[1] = 0.0
    assert kept(row, 0.5) == {4}
    assert kept(row, 1 - 1.5e-8) == {4, 5}


def test_zeros_of_either_sign_are_needed_only_by_p_1() -> None:
    row = [0.0, 0.5, -0.0, 0.5]
    assert kept(row, 1 - 2**-53) == {1, 3}
    assert kept(row, 1.0) == kept(row, 2.0) == {0, 1, 2, 3}
    assert kept([0.3, -5.0, 0.7, -0.1], 0.99) == {0, 2}  # negative ones count as zero


def test_p_of_1_is_the_visible_context_and_no_more() -> None:
    mask = nucleus(torch.rand(3, 9), 1.0, torch.tensor([9, 4, 0]), sink=2, recent=3)
    assert mask.tolist() == [[i < length for i in range(9)] for length in (9, 4, 0)]


@pytest.mark.parametrize("poison", [NAN, -NAN, float("inf"), 1e9])
def test_what_lies_beyond_the_length_does_not_matter(poison: float) -> None:
    weights = torch.rand(2, 3, 12)
    clean = weights.clone()
    clean[0, :, 7:] = 0
    weights[0, :, 7:] = poison
    lengths = torch.tensor([7, 12])
    assert torch.equal(nucleus(weights, 0.6, lengths), nucleus(clean, 0.6, lengths))
    assert torch.equal(top_k(weights, 5, lengths), top_k(clean, 5, lengths))
    assert not nucleus(weights, 1.0, lengths)[0, :, 7:].any()


@pytest.mark.parametrize("bad", [0.0, NAN, float("inf")])
def test_a_row_without_a_mass_keeps_everything_visible_and_only_that_row(bad: float) -> None:
    weights = torch.tensor([[0.1, 0.8, 0.1, 0.0], [0.0, bad, 0.0, 0.0], [0.1, 0.1, 0.8, 0.0]])
    mask = nucleus(weights, 0.5, torch.tensor([4, 3, 4]))
    assert [positions(row) for row in mask] == [{1}, {0, 1, 2}, {2}]


def test_forced_positions_are_kept_and_their_mass_counts() -> None:
    row = [0.4, 0.05, 0.2, 0.3, 0.05, 0.0]
    assert kept(row, 0.7, sink=1, recent=2) == {0, 3, 4, 5}
    assert kept(row, 0.4, sink=1, recent=2) == {0, 4, 5}
    assert kept(row, 0.1, sink=9) == kept(row, 0.1, recent=9) == set(range(6))


def test_recent_is_counted_from_the_visible_end() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0, 5.0]]).repeat(2, 1)
    mask = nucleus(weights, 0.9, torch.tensor([4, 3]), recent=1)
    assert [positions(row) for row in mask] == [{1, 3}, {1, 2}]


def test_leading_dimensions_and_a_p_for_each_row() -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 33)
    p = torch.tensor([0.2, 0.5, 0.9, 1.0])
    lengths = [33, 20]
    mask = nucleus(weights, p, torch.tensor(lengths), sink=1, recent=2)
    for batch, layer, head in [(0, 0, 0), (0, 2, 3), (1, 1, 1), (1, 2, 2), (1, 0, 3)]:
        row = weights[batch, layer, head, : lengths[batch]].tolist()
        assert positions(mask[batch, layer, head]) == kept(row, p[head].item(), sink=1, recent=2)


def test_a_k_for_each_row() -> None:
    torch.manual_seed(0)
    mask = top_k(torch.rand(2, 3, 20), torch.tensor([[0], [7]]), torch.tensor([20, 5]), recent=2)
    assert mask.sum(-1).tolist() == [[2, 2, 2], [5, 5, 5]]


def test_top_k_ranks_nan_with_infinity_and_negative_weights_with_zero() -> None:
    weights = torch.tensor([[0.0, -NAN, -0.0, float("inf"), -1.0, 0.5, NAN, 0.0]])
    for k in range(9):
        expected = [6, 3, 1, 5, 7, 4, 2, 0][:k]
        assert positions(top_k(weights, k, full(weights))[0]) == set(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    weights = torch.rand(2, 40).to(dtype)
    assert torch.equal(nucleus(weights, 0.7, full(weights)), nucleus(weights.float(), 0.7, full(weights)))


def test_strided_weights_are_left_as_they_were() -> None:
    strided = torch.rand(30, 2).T
    before = strided.clone(memory_format=torch.contiguous_format)
    assert torch.equal(nucleus(strided, 0.7, full(strided)), nucleus(before, 0.7, full(before)))
    assert torch.equal(strided, before)


def test_a_row_with_mass_keeps_something_however_small_p_is() -> None:
    assert kept([0.0, 1e-45, 0.0], 5e-324) == {1}


@pytest.mark.parametrize("p", [0.0, -0.5, NAN])
def test_p_that_is_no_fraction_is_refused(p: float) -> None:
    with pytest.raises(UsageError, match="p = "):
        nucleus(torch.rand(1, 4), p, torch.tensor([4]))


def test_negative_k_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="k = -1"):
        top_k(torch.rand(1, 4), -1, torch.tensor([4]))
    with pytest.raises(UsageError, match="lengths has shape"):
        nucleus(torch.rand(2, 4), 0.5, torch.tensor([4]))


def test_nothing_is_asked_of_the_host() -> None:
    """Tensors of the meta device have no values: any read of one on the host raises."""
    weights = torch.rand(2, 3, 64, device="meta")
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    for p in (0.9, weights[..., 0]):
        assert nucleus(weights, p, lengths, sink=4, recent=8).shape == weights.shape
    assert top_k(weights, 7, lengths).shape == weights.shape
