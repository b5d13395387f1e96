"""The paged pool: block tables, append, rollback, sharing, refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specattn.cache import PagedKVCache
from specattn.errors import CacheFullError, UsageError
from specattn.geometry import KVGeometry
from specattn.stores.page_bounds import PageBounds

GEOMETRY = KVGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float32)

BOUNDS = PageBounds(4)


def make_cache(tokens: int = 64, slots: int = 4, page_size: int = 4, **options) -> PagedKVCache:
    cache = PagedKVCache(GEOMETRY, tokens=tokens, slots=slots, page_size=page_size, **options)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(float("nan"))
    return cache


def write(cache: PagedKVCache, slot: int, start: int, count: int, seed: int = 0) -> tuple[list, list]:
    """Append random tokens to every layer; returns keys and values ``[count, heads, dim]`` of each layer."""
    generator = torch.Generator().manual_seed(1000 * seed + start)
    slots = torch.tensor([slot])
    positions = torch.arange(start, start + count)[None]
    rows = cache.rows(slots, positions)
    keys, values = [], []
    for layer in range(GEOMETRY.layers):
        key, value = torch.randn(2, 1, GEOMETRY.kv_heads, count, GEOMETRY.head_dim, generator=generator)
        cache.append(layer, slots, positions, rows, key, value)
        keys.append(key[0].transpose(0, 1))
        values.append(value[0].transpose(0, 1))
    cache.set_length(slot, start + count)
    return keys, values


def read(cache: PagedKVCache, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = cache.segments(layer, slot, 0, cache.length(slot))
    return torch.cat([key for key, _ in parts]), torch.cat([value for _, value in parts])


def test_appended_tokens_come_back_in_order_and_without_copies():
    cache = make_cache()
    slot = cache.allocate(20)
    first, second = write(cache, slot, 0, 7), write(cache, slot, 7, 6)
    for layer in range(GEOMETRY.layers):
        keys, values = read(cache, slot, layer)
        assert torch.equal(keys, torch.cat([first[0][layer], second[0][layer]]))
        assert torch.equal(values, torch.cat([first[1][layer], second[1][layer]]))
        (segment,) = cache.segments(layer, slot, 0, 13)
        assert segment[0].untyped_storage().data_ptr() == cache.keys[layer].untyped_storage().data_ptr()


def test_scattered_pages_read_like_neighbours():
    cache = make_cache(tokens=48, slots=4)
    a, b, c = (cache.allocate(16) for _ in range(3))
    cache.free(a)
    cache.free(c)
    # 48 tokens need 12 pages; the free ones lie on both sides of b's.
    slot = cache.allocate(48)
    keys, _ = write(cache, slot, 0, 48)
    assert len(cache.segments(0, slot, 0, 48)) == 2
    assert torch.equal(read(cache, slot, 1)[0], keys[1])
    assert cache.length(b) == 0


def test_segments_cut_to_a_range():
    cache = make_cache()
    slot = cache.allocate(24)
    keys, _ = write(cache, slot, 0, 24)
    part = torch.cat([key for key, _ in cache.segments(0, slot, 5, 18)])
    assert torch.equal(part, keys[0][5:18])


def test_gather_follows_the_lists_of_each_head_and_padding_reads_token_zero():
    cache = make_cache()
    slots = [cache.allocate(20), cache.allocate(20)]
    written = [write(cache, slot, 0, 15, seed=slot) for slot in slots]
    indices = torch.tensor(
        [[[0, 3, 14, -1], [1, 2, -1, -1]], [[5, 6, 7, 8], [9, -1, -1, -1]]], dtype=torch.int32
    )
    keys, values = cache.gather(1, torch.tensor(slots), indices)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for column, position in enumerate(indices[b, h].tolist()):
            expected = written[b][0][1][max(position, 0), h], written[b][1][1][max(position, 0), h]
            assert torch.equal(keys[b, h, column], expected[0])
            assert torch.equal(values[b, h, column], expected[1])


def test_writes_of_padding_land_on_nobodys_page():
    cache = make_cache()
    slot, other = cache.allocate(4), cache.allocate(4)
    write(cache, other, 0, 4)
    before = read(cache, other, 0)[0].clone()
    # Position 4 is beyond the slot's single page: its block table entry is page 0.
    rows = cache.rows(torch.tensor([slot]), torch.tensor([[4]]))
    assert rows.item() < cache.page_size
    assert torch.equal(read(cache, other, 0)[0], before)


def test_rollback_leaves_no_trace_in_pool_length_or_side_store():
    plain, rolled = make_cache(stores=[BOUNDS]), make_cache(stores=[BOUNDS])
    slots = [cache.allocate(32) for cache in (plain, rolled)]
    for cache, slot in zip((plain, rolled), slots, strict=True):
        write(cache, slot, 0, 10)
    write(rolled, slots[1], 10, 5, seed=7)
    rolled.set_length(slots[1], 10)
    for cache, slot in zip((plain, rolled), slots, strict=True):
        write(cache, slot, 10, 3)
    assert rolled.length(slots[1]) == plain.length(slots[0]) == 13
    assert torch.equal(read(plain, slots[0], 1)[0], read(rolled, slots[1], 1)[0])
    for layer in range(GEOMETRY.layers):
        pages = [bounds(cache, slot, layer) for cache, slot in zip((plain, rolled), slots, strict=True)]
        assert torch.equal(*pages)


def bounds(cache: PagedKVCache, slot: int, layer: int) -> torch.Tensor:
    """Minima and maxima ``[2, pages, heads, dim]`` of the pages that ``slot`` has begun."""
    first = torch.arange(0, cache.length(slot), BOUNDS.page)[None]
    entries = cache.rows(torch.tensor([slot]), first)[0] // BOUNDS.page
    return cache.stores[BOUNDS].bounds[layer][entries].transpose(0, 1)


@pytest.mark.parametrize("steps", [[13], [1] * 13, [3, 4, 4, 2], [8, 5], [11, -4, 1, -1, 5, 1]])
def test_page_bounds_are_those_of_the_tokens_however_they_came(steps):
    cache = make_cache(stores=[BOUNDS])
    cache.allocate(8)
    slot, length = cache.allocate(24), 0
    for seed, count in enumerate(steps):
        if count > 0:
            write(cache, slot, length, count, seed)
        length += count
        cache.set_length(slot, length)
    for layer in range(GEOMETRY.layers):
        keys = read(cache, slot, layer)[0]
        pages = keys.split(BOUNDS.page)
        expected = [
            torch.stack([extreme(page, 0).values for page in pages]) for extreme in (torch.min, torch.max)
        ]
        assert torch.equal(bounds(cache, slot, layer), torch.stack(expected))


def lists(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """For each layer and head ``count`` ascending positions below ``length``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(length, generator=generator)[:count].sort().values for _ in range(4)]
    return torch.stack(drawn).view(GEOMETRY.layers, GEOMETRY.kv_heads, count)


def test_compaction_moves_what_each_head_keeps_to_the_front():
    cache = make_cache()
    other, slot = cache.allocate(8), cache.allocate(24)
    neighbour = write(cache, other, 0, 8, seed=5)
    keys, values = write(cache, slot, 0, 23)
    kept = lists(9, 23)
    cache.compact(slot, kept)
    assert (cache.length(slot), cache.evicted(slot), cache.position(slot)) == (9, 14, 23)
    more = write(cache, slot, 9, 1)
    for layer in range(GEOMETRY.layers):
        key, value = read(cache, slot, layer)
        for head in range(GEOMETRY.kv_heads):
            for place, token in enumerate(kept[layer, head].tolist()):
                assert torch.equal(key[place, head], keys[layer][token, head])
                assert torch.equal(value[place, head], values[layer][token, head])
        assert torch.equal(key[9:], more[0][layer])
        assert torch.equal(read(cache, other, layer)[0], neighbour[0][layer])


def test_compaction_gives_pages_back_and_keeps_room_for_the_rest():
    cache = make_cache(tokens=40, slots=2)
    free = len(cache._free_pages)
    slot = cache.allocate(37)
    write(cache, slot, 0, 30)
    assert not cache.fits(20)
    cache.compact(slot, lists(7, 30))
    # 7 of 30 tokens are left, and 7 more may come: 14 tokens in 4 pages.
    assert cache.capacity(slot) == 16
    assert cache.used_bytes == 16 * GEOMETRY.token_bytes
    assert len(cache._free_pages) == free - 4
    assert (cache.block_table[slot] > 0).sum() == 4
    keys, _ = write(cache, slot, 7, 7)
    again = cache.allocate(20)
    write(cache, again, 0, 20, seed=3)
    assert torch.equal(read(cache, slot, 1)[0][7:], keys[1])
    cache.free(slot)
    cache.free(again)
    assert (cache.used_bytes, len(cache._free_pages)) == (0, free)
    fresh = cache.allocate(9)
    assert (cache.evicted(fresh), cache.position(fresh)) == (0, 0)


def test_many_small_compactions_free_as_much_as_one():
    cache = make_cache(tokens=40, slots=1)
    slot = cache.allocate(40)
    write(cache, slot, 0, 33)
    for length in range(33, 13, -1):
        cache.compact(slot, lists(length - 1, length, seed=length))
    assert cache.length(slot) == 13
    assert cache.capacity(slot) == 20  # 13 tokens, and the 7 that were still to come


def test_compaction_leaves_side_stores_as_if_only_the_kept_tokens_had_come():
    cache = make_cache(stores=[BOUNDS])
    slot = cache.allocate(24)
    write(cache, slot, 0, 22)
    cache.compact(slot, lists(10, 22))
    for layer in range(GEOMETRY.layers):
        pages = read(cache, slot, layer)[0].split(BOUNDS.page)
        expected = [
            torch.stack([page.amin(0) for page in pages]),
            torch.stack([page.amax(0) for page in pages]),
        ]
        assert torch.equal(bounds(cache, slot, layer), torch.stack(expected))


def test_tokens_are_copied_from_another_cache():
    source, cache = make_cache(), make_cache(page_size=8)
    source.allocate(4)
    first, slot = source.allocate(20), cache.allocate(20)
    keys, values = write(source, first, 0, 18)
    cache.copy(slot, source, first, lists(18, 18))
    assert cache.length(slot) == 18
    for layer in range(GEOMETRY.layers):
        assert torch.equal(read(cache, slot, layer)[0], keys[layer])
        assert torch.equal(read(cache, slot, layer)[1], values[layer])


@pytest.mark.parametrize("shape", [(2, 2, 7), (1, 2, 3), (2, 4, 3)])
def test_lists_that_do_not_fit_are_refused(shape):
    cache = make_cache()
    slot = cache.allocate(20)
    write(cache, slot, 0, 6)
    with pytest.raises(UsageError, match=r"does not fit 2 layers, 2 KV heads and the 6 tokens"):
        cache.compact(slot, torch.zeros(shape, dtype=torch.int64))
    assert cache.length(slot) == 6


def test_stores_with_large_pages_get_a_pool_with_large_pages():
    cache = PagedKVCache(GEOMETRY, tokens=100, slots=2, stores=[PageBounds(4), PageBounds(64)])
    assert cache.page_size == 64
    rows = cache.keys[0].shape[0]
    expected = rows * GEOMETRY.token_bytes + sum(spec.nbytes(GEOMETRY, rows) for spec in cache.stores)
    assert cache.nbytes == expected
    with pytest.raises(UsageError, match="page=24 is no power of two"):
        PagedKVCache(GEOMETRY, tokens=100, slots=2, stores=[PageBounds(24)])


def test_a_reused_slot_starts_empty():
    cache = make_cache()
    slot = cache.allocate(16)
    write(cache, slot, 0, 9)
    cache.free(slot)
    assert cache.used_bytes == 0
    again = cache.allocate(16)
    assert again == slot
    assert cache.length(again) == 0


def test_accounting():
    cache = make_cache(tokens=64, slots=4, page_size=4)
    assert GEOMETRY.token_bytes == 2 * 2 * 2 * 8 * 4
    assert cache.nbytes == (1 + 16 + 4) * 4 * GEOMETRY.token_bytes
    cache.allocate(9)
    assert cache.used_bytes == 12 * GEOMETRY.token_bytes


def test_a_request_that_does_not_fit_is_refused_and_changes_nothing():
    cache = make_cache(tokens=32, slots=2, max_length=32)
    cache.allocate(24)
    used = cache.used_bytes
    with pytest.raises(CacheFullError, match=r"28 tokens needs 7 pages"):
        cache.allocate(28)
    assert cache.used_bytes == used
    cache.allocate(8)
    with pytest.raises(CacheFullError, match="0 slots are free"):
        cache.allocate(1)


def test_a_pool_larger_than_memory_is_refused_with_both_figures():
    with pytest.raises(CacheFullError, match=r"needs [\d.]+ GiB and [\d.]+ GiB are free"):
        PagedKVCache(GEOMETRY, tokens=10**12, slots=1)


@pytest.mark.parametrize("length", [-1, 21])
def test_a_length_outside_the_slot_is_refused(length):
    cache = make_cache()
    slot = cache.allocate(20)
    with pytest.raises(UsageError, match="room for 20"):
        cache.set_length(slot, length)


def test_an_empty_slot_is_refused():
    with pytest.raises(UsageError, match="holds no request"):
        make_cache().length(2)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=30))
def test_pages_are_never_shared_and_never_lost(actions):
    cache = make_cache(tokens=64, slots=4)
    total = len(cache._free_pages)
    held: list[int] = []
    for release, tokens in actions:
        if release and held:
            cache.free(held.pop(0))
        elif cache.fits(tokens):
            held.append(cache.allocate(tokens))
        tables = [page for slot in held for page in cache.block_table[slot].tolist() if page]
        assert len(tables) == len(set(tables))
        assert len(tables) + len(cache._free_pages) == total
        assert 0 not in cache._free_pages
