"""The Hilbert order of a grid: every cell once, neighbours beside each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.hilbert import hilbert_permutation

SHAPES = st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(*[st.integers(1, 13)] * 3))


def cells(order: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The coordinates ``[cells, axes]`` of row-major numbers."""
    return torch.stack(torch.unravel_index(order, shape), 1)


@given(SHAPES)
def test_every_cell_comes_once_and_the_inverse_puts_it_back(shape):
    order, inverse = hilbert_permutation(shape)
    everything = torch.arange(torch.Size(shape).numel())
    assert order.dtype == inverse.dtype == torch.int64
    assert torch.equal(order.sort().values, everything)
    assert torch.equal(order[inverse], everything) and torch.equal(inverse[order], everything)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 8), (64, 64), (2, 2, 2), (4, 4, 4), (16, 16, 16)])
def test_in_a_cube_with_a_side_of_a_power_of_two_each_step_goes_to_a_neighbour(shape):
    path = cells(hilbert_permutation(shape)[0], shape)
    assert ((path[1:] - path[:-1]).abs().sum(1) == 1).all()
    assert (path[0] == 0).all()


@pytest.mark.parametrize("shape,side", [((64, 64), 8), ((32, 32), 2), ((16, 16, 16), 4), ((8, 8, 8), 2)])
def test_a_block_of_tokens_is_a_square_or_a_cube(shape, side):
    path = cells(hilbert_permutation(shape)[0], shape)
    blocks = path.unflatten(0, (-1, side ** len(shape)))
    assert (blocks.amax(1) - blocks.amin(1) == side - 1).all()


@pytest.mark.parametrize("shape", [(45, 80), (30, 45), (13, 45, 80), (12, 20, 20)])
def test_blocks_of_other_grids_are_compact_too(shape):
    """The mean distance of a block's cells from its centre, against row-major order."""

    def spread(order: Tensor) -> float:
        path = cells(order, shape).double()[: len(order) // 64 * 64].unflatten(0, (-1, 64))
        return float((path - path.mean(1, keepdim=True)).norm(dim=-1).mean())

    order, _ = hilbert_permutation(shape)
    assert spread(order) < 0.4 * spread(torch.arange(len(order)))


@given(SHAPES)
def test_the_order_is_that_of_the_enclosing_cube(shape):
    side = 1 << max(1, (max(shape) - 1).bit_length())
    whole = cells(hilbert_permutation((side,) * len(shape))[0], (side,) * len(shape))
    inside = whole[(whole < torch.tensor(shape)).all(1)]
    assert torch.equal(cells(hilbert_permutation(shape)[0], shape), inside)


@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 2, 2), (4, 0), (3, -1, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UsageError, match="two or three sides"):
        hilbert_permutation(shape)
