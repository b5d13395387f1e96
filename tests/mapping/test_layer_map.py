"""The layer map against every monotone map there is."""

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.layer_map import monotone_map


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Small integers, so that ties are common and sums are exact."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = st.lists(st.integers(-3, 0), min_size=columns, max_size=columns)
    return torch.tensor(draw(st.lists(values, min_size=rows, max_size=rows)), dtype=torch.float32)


def brute_force(scores: Tensor) -> list[int]:
    """The best monotone map; ``max`` keeps the first of equals, and maps come in lexicographic order."""
    maps = combinations_with_replacement(range(scores.shape[1]), scores.shape[0])
    rows = range(scores.shape[0])
    return list(
        max(maps, key=lambda layers: sum(scores[j, i].item() for j, i in zip(rows, layers, strict=True)))
    )


@given(matrices())
def test_agrees_with_brute_force_ties_included(scores: Tensor) -> None:
    assert monotone_map(scores).tolist() == brute_force(scores)


def test_a_diagonal_is_followed() -> None:
    assert monotone_map(torch.eye(6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_one_draft_layer_may_serve_many() -> None:
    assert monotone_map(torch.tensor([[0.0, 1], [0, 1], [0, 1]])).tolist() == [1, 1, 1]


def test_a_reversed_diagonal_cannot_be_followed() -> None:
    assert monotone_map(torch.eye(3).flip(0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[0.0, float("nan")]])],
    ids=["1-D", "empty", "nan"],
)
def test_what_is_no_similarity_is_refused(scores: Tensor) -> None:
    with pytest.raises(UsageError, match="calibrate again"):
        monotone_map(scores)
