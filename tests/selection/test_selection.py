"""The list form of a selection."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import composite

from specattn.kernels.sparse_attention import trim
from specattn.selection.base import Selection


@composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)))
    size = shape[0] * shape[1] * shape[2]
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(bits).view(shape)


@given(masks())
def test_lists_are_ascending_padded_and_counted(mask):
    selection = Selection.from_mask(mask)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.indices.shape == mask.shape
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            expected = mask[b, h].nonzero()[:, 0].tolist()
            count = int(selection.counts[b, h])
            assert count == len(expected)
            assert selection.indices[b, h, :count].tolist() == expected
            assert (selection.indices[b, h, count:] == -1).all()


@given(masks())
def test_a_mask_survives_the_round_trip_and_trimming(mask):
    selection = Selection.from_mask(mask)
    assert torch.equal(selection.to_mask(mask.shape[-1]), mask)
    short = trim(selection)
    assert short.indices.shape[-1] == max(1, int(mask.sum(-1).max()))
    assert torch.equal(short.to_mask(mask.shape[-1]), mask)


@given(masks(), st.integers(0, 2**40))
def test_a_narrowed_selection_keeps_the_wanted_entries_in_order(mask, bits):
    offered = Selection.from_mask(mask)
    wanted = torch.tensor([bits >> i & 1 for i in range(mask.numel())], dtype=torch.bool).view(mask.shape)
    kept = offered.narrowed(wanted)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            count = int(offered.counts[b, h])
            expected = offered.indices[b, h, :count][wanted[b, h, :count]].tolist()
            assert kept.indices[b, h, : len(expected)].tolist() == expected
            assert int(kept.counts[b, h]) == len(expected)
            assert (kept.indices[b, h, len(expected) :] == -1).all()


def test_trimming_keeps_the_weights_in_step():
    mask = torch.tensor([[[True, False, True, False]]])
    full = Selection.from_mask(mask)
    weighted = Selection(full.indices, full.counts, torch.tensor([[[0.5, 0.25, 0.0, 0.0]]]))
    assert trim(weighted).log_weights.tolist() == [[[0.5, 0.25]]]
