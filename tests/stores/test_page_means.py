"""Means of pages: what they are of, in which precision, how large, and what rollback leaves of them."""

from __future__ import annotations

import pytest
import torch

from specattn.cache import PagedKVCache
from specattn.geometry import KVGeometry
from specattn.stores.page_means import PageMeans

SPEC = PageMeans(16)


def filled(
    dtype: torch.dtype, pieces: list[int], kept: list[int]
) -> tuple[PagedKVCache, int, list[torch.Tensor]]:
    """A cache that took ``pieces`` tokens at a time, of which ``kept`` stood; keys and values of those."""
    geometry = KVGeometry(layers=2, query_heads=6, kv_heads=2, head_dim=8, dtype=dtype)
    cache = PagedKVCache(geometry, tokens=200, slots=2, stores=[SPEC])
    for pool in (*cache.keys, *cache.values):
        pool.fill_(float("nan"))
    cache.allocate(50)
    slot = cache.allocate(100)
    generator = torch.Generator().manual_seed(1)
    length, stood = 0, []
    for count, keep in zip(pieces, kept, strict=True):
        drawn = torch.randn(2, 1, 2, count, 8, generator=generator).to(dtype)
        positions = torch.arange(length, length + count)[None]
        rows = cache.rows(torch.tensor([slot]), positions)
        cache.append(1, torch.tensor([slot]), positions, rows, drawn[0], drawn[1])
        stood.append(drawn[:, 0, :, :keep])
        length += keep
    return cache, slot, list(torch.cat(stood, 2))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-10)])
@pytest.mark.parametrize(
    "pieces,kept", [([35], [35]), ([20, 9, 5, 6], [20, 2, 1, 6]), ([16, 5, 1], [16, 1, 1])]
)
def test_means_are_of_the_tokens_that_count(dtype, tolerance, pieces, kept):
    cache, slot, stood = filled(dtype, pieces, kept)
    length = stood[0].shape[1]
    first = torch.arange(0, length, 16)
    means = cache.stores[SPEC].read(1, cache.rows(torch.tensor([slot]), first[None]))
    for found, tokens in zip(means, stood, strict=True):
        assert found.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        for page, begin in enumerate(first.tolist()):
            expected = tokens[:, begin : begin + 16].double().mean(1)
            torch.testing.assert_close(found[0, page].double(), expected, rtol=tolerance, atol=tolerance)


def test_a_page_takes_the_bytes_of_a_token():
    cache, _, _ = filled(torch.bfloat16, [3], [3])
    pages = cache.keys[0].shape[0] // 16
    assert (
        cache.stores[SPEC].nbytes
        == SPEC.nbytes(cache.geometry, pages * 16)
        == pages * cache.geometry.token_bytes
    )
