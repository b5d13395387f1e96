"""Bounds of pages against a plain reading: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draft_case import DEVICE, DTYPES, NAN, DraftCase, draft_case

from specattn.errors import UsageError
from specattn.kernels.page_bounds import PageBounds, update_page_bounds, update_page_bounds_reference
from specattn.kernels.paged import PagedBatch

BOTH = pytest.mark.parametrize("update", [update_page_bounds, update_page_bounds_reference])


def poisoned(case: DraftCase) -> PageBounds:
    bounds = PageBounds.empty(case.keys, case.batch.page_size)
    bounds.lower.fill_(NAN)
    bounds.upper.fill_(NAN)
    return bounds


def check_pages(case: DraftCase, bounds: PageBounds, firsts: list[int]) -> None:
    """Each request's pages from the one of token ``firsts`` on hold their tokens' extremes, all others are poison."""
    size = case.batch.page_size
    untouched = set(range(len(bounds.lower)))
    for request, (length, first) in enumerate(zip(case.lengths, firsts, strict=True)):
        for page in range(first // size, -(-length // size)):
            keys = case.clean_keys[request][page * size : min(length, (page + 1) * size)]
            at = int(case.batch.block_table[case.batch.slots[request], page])
            untouched.remove(at)
            assert torch.equal(bounds.lower[at], keys.amin(0))
            assert torch.equal(bounds.upper[at], keys.amax(0))
    rest = sorted(untouched)
    assert bounds.lower[rest].isnan().all() and bounds.upper[rest].isnan().all()


@BOTH
@pytest.mark.parametrize("page_size", [1, 16, 32])
@pytest.mark.parametrize("appended", [1, 5, 16, 17, 36])
def test_the_pages_of_an_append_and_no_others(update, page_size, appended):
    case = draft_case([36, 33, 0, 16, 1], page_size=page_size, head_dim=32, kv_heads=3, query_heads=3)
    bounds = poisoned(case)
    update(case.keys, bounds, case.batch, appended)
    check_pages(case, bounds, [max(0, length - appended) for length in case.lengths])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes_and_channels(dtype, head_dim):
    case = draft_case([70, 18], dtype=dtype, head_dim=head_dim)
    bounds = poisoned(case)
    update_page_bounds(case.keys, bounds, case.batch, 70)
    check_pages(case, bounds, [0, 0])


@BOTH
@pytest.mark.parametrize("kept", [1, 15, 16, 17, 31, 32, 33])
def test_a_rejected_token_leaves_no_trace_after_the_next_append(update, kept):
    """Five tokens with enormous keys come and are rejected, then two others come."""
    case = draft_case([kept + 5])
    rejected = case.keys.clone()
    rows = case.batch.rows(0, torch.arange(kept, kept + 5, device=DEVICE))
    rejected[rows] = 1e6 * torch.randn_like(rejected[rows])

    def of_length(length: int) -> PagedBatch:
        return replace(case.batch, lengths=torch.full_like(case.batch.lengths, length))

    bounds, fresh = poisoned(case), poisoned(case)
    update(case.keys, bounds, of_length(kept), kept)
    update(rejected, bounds, of_length(kept + 5), 5)
    update(case.keys, bounds, of_length(kept + 2), 2)
    update(case.keys, fresh, of_length(kept + 2), kept + 2)
    pages = case.batch.visible_rows(0)[: kept + 2 : 16] // 16
    assert torch.equal(bounds.lower[pages], fresh.lower[pages])
    assert torch.equal(bounds.upper[pages], fresh.upper[pages])


def test_what_does_not_fit_is_refused():
    case = draft_case([40])
    bounds = poisoned(case)
    with pytest.raises(UsageError, match="appended=0"):
        update_page_bounds(case.keys, bounds, case.batch, 0)
    with pytest.raises(UsageError, match="lower has shape"):
        update_page_bounds(case.keys, replace(bounds, lower=bounds.lower[1:]), case.batch, 1)
    with pytest.raises(UsageError, match="page_size=24"):
        update_page_bounds(case.keys, bounds, replace(case.batch, page_size=24), 1)
