"""The global set: whole groups, and why they are eliminated step by step."""

import pytest
import torch
from mapping_rounds import mixed_rounds
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.global_set import fit_groups, groups_for, heaviest_groups
from specattn.mapping.mixture import fit_mixture, mixture_divergence
from specattn.mapping.samples import RoundSample

SIZE, GROUPS = 2, 8
COPIES = (1, 3, 5, 6)
"""Groups whose heads are all alike: together they matter most, and each has a quarter of their weight."""


def target_rows(sample: RoundSample) -> Tensor:
    return sample.target


def rounds_with_copies() -> list[RoundSample]:
    """Of two targets one is met by any of the copies, the other by groups 0 (.6) and 4 (.4)."""
    weights = torch.zeros(2, GROUPS, SIZE)
    weights[0, 1] = torch.tensor([0.7, 0.3])
    weights[1, 0] = 0.3
    weights[1, 4] = torch.tensor([0.0, 0.4])
    samples = mixed_rounds(weights.flatten(1))
    for sample in samples:
        groups = sample.draft.unflatten(0, (GROUPS, SIZE))
        groups[list(COPIES)] = groups[1].clone()
    return samples


@pytest.mark.parametrize(
    ("heads", "size", "available", "expected"),
    [(84, 7, 48, 12), (64, 7, 48, 9), (1, 7, 48, 1), (3, 7, 48, 1), (99, 2, 6, 6), (64, 1, 336, 64)],
)
def test_as_many_groups_as_come_nearest(heads: int, size: int, available: int, expected: int) -> None:
    assert groups_for(heads, size, available) == expected


def test_the_heaviest_groups_in_order() -> None:
    heads = torch.tensor([2, 3, 4, 5, 10, 11])
    weights = torch.tensor([[0.1, 0.2, 0.5, 0.0, 0.1, 0.1], [0.1, 0.2, 0.0, 0.0, 0.3, 0.4]])
    assert heaviest_groups(weights, heads, 1, size=2).tolist() == [10, 11], "the largest head is in another"
    assert heaviest_groups(weights, heads, 2, size=2).tolist() == [2, 3, 10, 11]
    assert heaviest_groups(weights, heads, 3, size=2).tolist() == heads.tolist()
    assert heaviest_groups(torch.full((3, 6), 0.2), heads, 1, size=2).tolist() == [2, 3], "a tie"
    assert heaviest_groups(weights, heads, 2, size=1).tolist() == [4, 11], "groups of one head"


@pytest.mark.parametrize("count", [0, 4])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} groups of draft heads.*1 to 3"):
        heaviest_groups(torch.ones(1, 6), torch.arange(6), count, size=2)


def test_what_others_can_replace_goes_first() -> None:
    samples = rounds_with_copies()
    weights, _ = fit_mixture(samples, target_rows)
    at_once = heaviest_groups(weights, torch.arange(GROUPS * SIZE), 2, SIZE)
    assert at_once.tolist() == [0, 1, 8, 9], "no copy has the weight that it is worth"
    heads, _, divergence = fit_groups(samples, target_rows, weights, groups=2, size=SIZE)
    assert heads[:2].tolist() == [0, 1] and int(heads[2]) // SIZE in COPIES
    _, of_at_once = fit_mixture(samples, target_rows, heads=at_once)
    assert divergence.mean() < of_at_once.mean() / 2


@pytest.mark.parametrize("groups", [1, 3, 5, 8])
def test_the_fit_is_that_of_the_set(groups: int) -> None:
    samples = rounds_with_copies()
    weights, full = fit_mixture(samples, target_rows)
    heads, limited, divergence = fit_groups(samples, target_rows, weights, groups=groups, size=SIZE)
    assert heads.dtype == torch.int64 and len(heads) == groups * SIZE and (heads.diff() > 0).all()
    assert torch.equal(heads[::SIZE] % SIZE, torch.zeros(groups, dtype=torch.int64))
    assert limited.shape == (2, groups * SIZE)
    torch.testing.assert_close(mixture_divergence(samples, target_rows, limited, heads), divergence)
    assert (divergence > full - 1e-4).all()


def test_each_step_takes_at_most_half_of_the_groups() -> None:
    passes: list[int] = []
    samples = rounds_with_copies()
    weights = torch.rand(2, GROUPS * SIZE, generator=torch.Generator().manual_seed(0))
    fit_groups(
        samples,
        target_rows,
        weights,
        groups=3,
        size=SIZE,
        iterations=2,
        progress=lambda number, mean: passes.append(number),
    )
    assert passes == [1, 2, 1, 2], "fits of four groups and of three"
