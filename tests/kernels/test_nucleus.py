"""The sorting-free nucleus and top-k against a plain sort in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus import nucleus, top_k

NAN = float("nan")
SLACK = Fraction(1, 10**12)  # far above float64's rounding of a sum, far below what a weight is worth


def full(weights: Tensor) -> Tensor:
    return torch.full(weights.shape[:1], weights.shape[-1])


def regions(length: int, sink: int, recent: int) -> tuple[set[int], set[int]]:
    forced = {i for i in range(length) if i < sink or i >= length - recent}
    return set(range(length)), forced


def by_weight(row: list[float], free: set[int]) -> list[int]:
    """Heaviest first, of equals the most recent first."""
    return sorted(free, key=lambda i: (-row[i], -i))


def sorted_nucleus(
    row: list[float], p: float | Fraction, length: int, sink: int = 0, recent: int = 0
) -> set[int]:
    visible, forced = regions(length, sink, recent)
    exact = [Fraction(weight) for weight in row[:length]]
    total = sum(exact, Fraction(0))
    if p >= 1 or total == 0:
        return visible
    kept, mass = set(forced), sum((exact[i] for i in forced), Fraction(0))
    for i in by_weight(row, visible - forced):
        if mass >= Fraction(p) * total:
            break
        kept.add(i)
        mass += exact[i]
    return kept


def sorted_top_k(row: list[float], k: int, length: int, sink: int = 0, recent: int = 0) -> set[int]:
    visible, forced = regions(length, sink, recent)
    return forced | set(by_weight(row, visible - forced)[: max(0, k - len(forced))])


def positions(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def check_against_sort(
    weights: Tensor, p: float, lengths: list[int], sink: int = 0, recent: int = 0
) -> Tensor:
    """The mask lies between the sorted nuclei of p a hair smaller and a hair larger."""
    mask = nucleus(weights, p, torch.tensor(lengths), sink=sink, recent=recent)
    for row, length, got in zip(weights.tolist(), lengths, mask, strict=True):
        least = sorted_nucleus(row, Fraction(p) * (1 - SLACK), length, sink, recent)
        most = sorted_nucleus(row, Fraction(p) * (1 + SLACK), length, sink, recent)
        assert least <= positions(got) <= most
    return mask


small = st.integers(0, 24)
# Sums of these are exact in float64: the result must equal the sorted one, ties and all.
dyadic = st.builds(
    lambda mantissa, exponent: mantissa * 2.0**exponent, st.integers(0, 7), st.integers(-20, 0)
)
any_weight = st.floats(0, 2.0**100, width=32, allow_subnormal=True)


def rows_of(weight: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, 24).flatmap(
        lambda length: st.lists(st.lists(weight, min_size=length, max_size=length), min_size=1, max_size=4)
    )


@given(rows_of(dyadic), st.integers(1, 1024), small, st.integers(0, 4), st.integers(0, 4))
def test_equals_the_sorted_nucleus(
    rows: list[list[float]], steps: int, short: int, sink: int, recent: int
) -> None:
    p = steps / 1024
    lengths = [max(0, len(row) - short * index) for index, row in enumerate(rows)]
    mask = nucleus(torch.tensor(rows), p, torch.tensor(lengths), sink=sink, recent=recent)
    for row, length, got in zip(rows, lengths, mask, strict=True):
        assert positions(got) == sorted_nucleus(row, p, length, sink, recent)


@given(rows_of(any_weight), st.floats(0, 1, exclude_min=True), st.integers(0, 3), st.integers(0, 3))
def test_any_floats_and_any_p(rows: list[list[float]], p: float, sink: int, recent: int) -> None:
    check_against_sort(torch.tensor(rows), p, [len(row) for row in rows], sink, recent)


@given(rows_of(any_weight), small, small, st.integers(0, 4), st.integers(0, 4))
def test_top_k_equals_the_sorted_one(
    rows: list[list[float]], k: int, short: int, sink: int, recent: int
) -> None:
    lengths = [max(0, len(row) - short * index) for index, row in enumerate(rows)]
    mask = top_k(torch.tensor(rows), k, torch.tensor(lengths), sink=sink, recent=recent)
    for row, length, got in zip(rows, lengths, mask, strict=True):
        assert positions(got) == sorted_top_k(row, k, length, sink, recent)


@given(rows_of(any_weight), st.floats(0, 1, exclude_min=True))
def test_mass_is_reached_and_the_set_minimal(rows: list[list[float]], p: float) -> None:
    weights = torch.tensor(rows)
    kept = nucleus(weights, p, full(weights), sink=1)
    for row, got in zip(rows, kept, strict=True):
        exact = [Fraction(weight) for weight in row]
        needed = Fraction(p) * sum(exact)
        chosen = positions(got)
        mass = sum(exact[i] for i in chosen)
        assert mass >= needed * (1 - SLACK)
        if p < 1 and sum(exact) > 0 and chosen - {0}:
            smallest = min(exact[i] for i in chosen - {0})
            assert mass - smallest < needed * (1 + SLACK)


# Powers of two of integers below 16: sums, and so the results, are exact, and scaling only moves exponents.
scalable = st.lists(st.integers(0, 15).map(float), min_size=1, max_size=40)


@given(scalable, st.integers(1, 63), st.integers(-140, 120))
def test_scaling_by_a_power_of_two_changes_nothing(row: list[float], steps: int, exponent: int) -> None:
    weights = torch.tensor([row], dtype=torch.float64)
    scaled = (weights * 2.0**exponent).float()  # reaches into the denormal numbers
    p = steps / 64
    assert torch.equal(nucleus(scaled, p, full(weights)), nucleus(weights.float(), p, full(weights)))


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
    weights = torch.full((1, length), value)
    mask = nucleus(weights, 0.5, full(weights))
    kept = -(-length // 2)
    assert positions(mask[0]) == set(range(length - kept, length))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_decimal_fractions_behave_as_written(p: float) -> None:
    weights = torch.full((1, 10), 0.1)
    assert nucleus(weights, p, full(weights)).sum() == round(10 * p)


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 0.999, 0.999999])
@pytest.mark.parametrize("length", [1, 257, 4096, 131_072])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 8.0])
def test_long_rows_of_attention(length: int, temperature: float, p: float) -> None:
    torch.manual_seed(length)
    weights = torch.randn(2, length).mul(temperature).softmax(-1)
    mask = nucleus(weights, p, full(weights))
    descending = weights.double().sort(-1, descending=True).values
    enough = descending.cumsum(-1)
    needed = p * weights.double().sum(-1, keepdim=True)
    least = (enough < needed * (1 - 1e-12)).sum(-1) + 1
    most = (enough < needed * (1 + 1e-12)).sum(-1) + 1
    counts = mask.sum(-1)
    assert (least <= counts).all() and (counts <= most).all()
    # The heaviest ones, whichever: what is left out weighs no more than what is kept.
    kept, dropped = weights.masked_fill(~mask, 2), weights.masked_fill(mask, 0)
    assert (kept.amin(-1) >= dropped.amax(-1)).all()


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
    weights = torch.cat([torch.tensor([0.9]), 1e-3 * tail / tail.sum()])[None].float()
    p = 0.9995  # the sink and about half of the rest, all of it below 0.9 / 2**10
    assert linear_bisection(weights[0], p, steps=10).all()
    mask = check_against_sort(weights, p, [4096])
    assert mask[0, 0] and mask.sum() < 1000


def test_one_weight_of_nearly_everything() -> None:
    weights = torch.full((1, 1001), 1e-6)
    weights[0, 500] = 0.999
    assert positions(nucleus(weights, 0.99, full(weights))[0]) == {500}
    mask = nucleus(weights, 0.9995, full(weights))
    assert positions(mask[0]) == {500, *range(501, 1001)}
    check_against_sort(weights, 0.9997, [1001])


def test_tiny_probabilities_beside_large_ones() -> None:
    weights = torch.tensor([[1e-45, 1.0, 1e-38, 0.0, 1e-30, 1e-38, -0.0, 1e-45]])
    assert positions(nucleus(weights, 0.999, full(weights))[0]) == {1}
    alone = weights.clone()
    alone[0, 1] = 0
    check_against_sort(alone, 0.5, [8])
    assert positions(nucleus(alone, 0.5, full(alone))[0]) == {4}
    assert positions(nucleus(alone, 1 - 1.5e-8, full(alone))[0]) == {4, 5}


def test_zeros_of_either_sign_are_needed_only_by_p_1() -> None:
    weights = torch.tensor([[0.0, 0.5, -0.0, 0.5]])
    assert positions(nucleus(weights, 1 - 2**-30, full(weights))[0]) == {1, 3}
    assert nucleus(weights, 1.0, full(weights)).all()
    assert nucleus(weights, 2.0, full(weights)).all()


def test_negative_weights_count_as_zero() -> None:
    weights = torch.tensor([[0.3, -5.0, 0.7, -0.1]])
    assert positions(nucleus(weights, 0.99, full(weights))[0]) == {0, 2}


def test_p_of_1_is_the_visible_context_and_no_more() -> None:
    weights = torch.rand(3, 9)
    mask = nucleus(weights, 1.0, torch.tensor([9, 4, 0]), sink=2, recent=3)
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
    weights = torch.tensor([[0.1, 0.8, 0.1, 0.0]]).repeat(3, 1)
    weights[1] = torch.zeros(4)
    weights[1, 1] = bad
    mask = nucleus(weights, 0.5, torch.tensor([4, 3, 4]))
    assert mask.tolist() == [[False, True, False, False], [True] * 3 + [False], [False, True, False, False]]


def test_forced_positions_are_kept_and_their_mass_counts() -> None:
    weights = torch.tensor([[0.4, 0.05, 0.2, 0.3, 0.05, 0.0]])
    assert positions(nucleus(weights, 0.7, full(weights), sink=1, recent=2)[0]) == {0, 3, 4, 5}
    assert positions(nucleus(weights, 0.4, full(weights), sink=1, recent=2)[0]) == {0, 4, 5}
    assert positions(nucleus(weights, 0.1, full(weights), sink=9)[0]) == set(range(6))
    assert positions(nucleus(weights, 0.1, full(weights), recent=9)[0]) == set(range(6))


def test_recent_is_counted_from_the_visible_end() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0, 5.0]]).repeat(2, 1)
    mask = nucleus(weights, 0.9, torch.tensor([4, 3]), recent=1)
    assert [positions(row) for row in mask] == [{1, 3}, {1, 2}]


def test_leading_dimensions_and_a_p_for_each_row() -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 33)
    p = torch.tensor([0.2, 0.5, 0.9, 1.0])
    lengths = torch.tensor([33, 20])
    mask = nucleus(weights, p, lengths, sink=1, recent=2)
    assert mask.shape == weights.shape
    for batch, layer, head in [(0, 0, 0), (0, 2, 3), (1, 1, 1), (1, 2, 2), (1, 0, 3)]:
        row = weights[batch, layer, head][None]
        alone = nucleus(row, p[head].item(), lengths[batch : batch + 1], sink=1, recent=2)
        assert torch.equal(mask[batch, layer, head], alone[0])


def test_a_k_for_each_row() -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 20)
    k = torch.tensor([[0], [7]])
    mask = top_k(weights, k, torch.tensor([20, 5]), recent=2)
    assert mask.sum(-1).tolist() == [[2, 2, 2], [5, 5, 5]]


def test_top_k_ranks_nan_and_infinity_first_and_counts_zeros() -> None:
    weights = torch.tensor([[1.0, -NAN, 0.0, float("inf"), 0.0, NAN]])
    assert positions(top_k(weights, 3, full(weights))[0]) == {1, 3, 5}
    assert positions(top_k(weights, 5, full(weights))[0]) == {0, 1, 3, 4, 5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    weights = torch.rand(2, 40).to(dtype)
    assert torch.equal(nucleus(weights, 0.7, full(weights)), nucleus(weights.float(), 0.7, full(weights)))


def test_strided_weights_are_left_as_they_were() -> None:
    base = torch.rand(30, 2)
    before = base.clone()
    assert torch.equal(
        nucleus(base.T, 0.7, torch.tensor([30, 30])),
        nucleus(base.T.contiguous(), 0.7, torch.tensor([30, 30])),
    )
    assert torch.equal(base, before)


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
    masks = [
        nucleus(weights, 0.9, lengths, sink=4, recent=8),
        nucleus(weights, weights[..., 0], lengths),
        top_k(weights, 7, lengths),
    ]
    assert all(mask.is_meta and mask.shape == weights.shape for mask in masks)
