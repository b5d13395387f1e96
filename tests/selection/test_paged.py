"""The paged round that other tests stand on."""

from __future__ import annotations

import pytest
import torch
from paged import contents, no_answers, paged_round

from specattn.geometry import KVGeometry
from specattn.stores.page_bounds import PageBounds

GEOMETRY = KVGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float32)


@pytest.mark.parametrize("rejected", [0, 7])
@pytest.mark.parametrize("page_size", [None, 4])
def test_requests_hold_their_tokens_on_scattered_pages_amid_nan(page_size, rejected):
    lengths, rows = [23, 41, 9], 3
    paged = paged_round(GEOMETRY, lengths, rows, (PageBounds(4),), 1, page_size, rejected=rejected)
    cache = paged.step.cache
    assert cache.page_size == (page_size or 16)
    pages = cache.block_table[1][: cache.pages_for(41 + max(rows, rejected))].tolist()
    assert pages != sorted(pages) and 0 not in pages
    written = 0
    for request, length in enumerate(lengths):
        keys, _ = contents(GEOMETRY, length, rows, seed=1)
        assert torch.equal(paged.source.keys(1)[request], keys[1].transpose(0, 1))
        assert cache.length(request) == length + rows
        written += length + max(rows, rejected)
    assert int((~cache.keys[0].isnan()).all((-1, -2)).sum()) == written
    assert bool(cache.stores[PageBounds(4)].bounds[1].isnan().any())


def test_a_request_is_the_same_in_any_batch():
    alone, together = paged_round(GEOMETRY, [41], 3), paged_round(GEOMETRY, [23, 41, 9], 3)
    assert torch.equal(alone.source.keys(0)[0], together.source.keys(0)[1])
    assert torch.equal(alone.queries(1)[0], together.queries(1)[1])
    assert not torch.equal(alone.queries(1), alone.queries(0))


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.max().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(x.abs().long()),
    ],
)
def test_questions_to_the_device_are_noticed(question):
    x = torch.arange(3)
    question(x)
    with no_answers(), pytest.raises(AssertionError, match="asks the device"):
        question(x)
