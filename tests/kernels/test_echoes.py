"""Echoes: the reference against a search token by token, the kernel against the reference, and lists that hold them."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels.echoes import LONGEST, NOWHERE, echo_mask, echoes_reference
from specattn.kernels.nucleus_lists_reference import nucleus_lists_reference

echoes_triton = pytest.importorskip("specattn.kernels.echoes_triton")
nucleus_lists = pytest.importorskip("specattn.kernels.nucleus_lists")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = torch.tensor([2, 0, 3], device=DEVICE)


def text(length: int, words: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(words, (4, length), generator=generator).int().to(DEVICE)


def searched(tokens: list[int], own: int, matches: int) -> set[int]:
    """The same of one row, token by token."""
    ranks = []
    for position in range(own):
        agree = 0
        while agree < LONGEST and agree <= position and tokens[position - agree] == tokens[own - agree]:
            agree += 1
        if agree:
            ranks.append((agree, position))
    return {position + 1 for _, position in sorted(ranks)[-matches:]}


@pytest.mark.parametrize("words", [1, 2, 9, 1000])
@pytest.mark.parametrize("matches", [1, 3, 4])
def test_reference_and_kernel_find_what_a_search_finds(words, matches):
    tokens, starts, rows = text(45, words), torch.tensor([0, 17, 40], device=DEVICE), 4
    for find in (echoes_reference, echoes_triton.echoes):
        found = find(tokens, SLOTS, starts, rows, matches)
        assert found.dtype == torch.int32 and found.shape == (3, rows * matches)
        for slot, start, own in zip(SLOTS.tolist(), starts.tolist(), found.tolist(), strict=True):
            for row in range(rows):
                places = [place for place in own[row * matches :][:matches] if place != NOWHERE]
                assert len(places) == len(set(places))
                assert set(places) == searched(tokens[slot].tolist(), start + row, matches)


def test_the_kernel_goes_through_texts_of_several_blocks(monkeypatch):
    monkeypatch.setattr(echoes_triton, "BLOCK", 32)
    tokens = text(300, 3, seed=1)
    starts = torch.tensor([250, 31, 96], device=DEVICE)
    found, wanted = (find(tokens, SLOTS, starts, 5, 3) for find in (echoes_triton.echoes, echoes_reference))
    assert torch.equal(*(part.view(3, 5, 3).sort(-1).values for part in (found, wanted)))


def test_starts_may_be_a_column_of_a_table():
    table = torch.tensor([[31, 9999, 7], [3, -5, 40], [44, 12, 2]], device=DEVICE)
    tokens = text(60, 3, seed=2)
    found, wanted = (
        find(tokens, SLOTS, table[:, 0], 2, 3) for find in (echoes_triton.echoes, echoes_reference)
    )
    assert torch.equal(*(part.view(3, 2, 3).sort(-1).values for part in (found, wanted)))


def test_a_text_that_repeats_itself_is_followed():
    tokens = torch.arange(40, dtype=torch.int32, device=DEVICE).repeat(1, 2)
    found = echoes_reference(
        tokens, torch.tensor([0], device=DEVICE), torch.tensor([55], device=DEVICE), 3, 2
    )
    assert found.view(3, 2)[:, 0].tolist() == [16, 17, 18]
    assert (found.view(3, 2)[:, 1] == NOWHERE).all()


def test_too_long_a_text(monkeypatch):
    monkeypatch.setattr(echoes_triton, "LONGEST_TEXT", 44)
    with pytest.raises(Exception, match="45 tokens are too long"):
        echoes_triton.echoes(text(45, 2), SLOTS, SLOTS, 1, 1)


def test_mask():
    mask = echo_mask(torch.tensor([[3, NOWHERE, 0], [9, 3, 3]]), 5)
    assert mask.nonzero().tolist() == [[0, 0], [0, 3], [1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [77, 2100])
def test_lists_hold_single_positions_beside_the_nucleus(dtype, length):
    """Those that are forced anyway, twice there or not visible change nothing."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 2, length, generator=generator).mul(2).softmax(-1).to(DEVICE, dtype)
    lengths = torch.tensor([length, 40, 7], device=DEVICE, dtype=torch.int32)
    also = torch.randint(length + 3, (3, 9), generator=generator).int().to(DEVICE)
    also[:, :4] = torch.tensor([NOWHERE, 1, 33, 33], dtype=torch.int32)
    options = {"capacity": length, "sink": 2, "recent": 5}
    found = nucleus_lists.nucleus_lists(scores, 0.6, lengths, also=also, **options)
    wanted = nucleus_lists_reference(scores, 0.6, lengths, also=also, **options)
    plain = nucleus_lists_reference(scores, 0.6, lengths, **options)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.counts, wanted.counts)
    assert (wanted.counts >= plain.counts).all() and (wanted.counts > plain.counts).any()
    kept = wanted.to_mask(length)
    visible = torch.arange(length, device=DEVICE) < lengths[:, None]
    assert (kept == (plain.to_mask(length) | (echo_mask(also, length) & visible)[:, None])).all()


def test_positions_for_another_batch_are_refused():
    scores = torch.ones(2, 3, 8, device=DEVICE)
    lengths = torch.full((2,), 8, device=DEVICE)
    with pytest.raises(Exception, match=r"give int32 positions \[2, n\]"):
        nucleus_lists.nucleus_lists(
            scores, 0.5, lengths, capacity=8, also=torch.zeros(1, 2, dtype=torch.int32)
        )
