"""The quantised copy of the keys: its format, its error, its bytes, and what rollback leaves of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specattn.cache import PagedKVCache
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.quantised_keys import BITS, decode, encode
from specattn.stores.quantised_keys import QuantisedKeys, QuantisedKeysStore

HALF = 2.0**-11
"""Relative rounding of float16; below 2**-14 the step is fixed."""


def geometry(head_dim: int = 8, dtype: torch.dtype = torch.float32) -> KVGeometry:
    return KVGeometry(layers=2, query_heads=6, kv_heads=2, head_dim=head_dim, dtype=dtype)


def rounded(value: float) -> float:
    """How far float16 may be from ``value``."""
    return max(abs(value) * HALF, 2.0**-25)


def bound(key: torch.Tensor, scale: float, zero: float, bits: int) -> float:
    """Half a step, and what rounding the range's ends to float16 may cost."""
    return scale / 2 + (2**bits - 1) * rounded(scale) + rounded(zero) + 1e-6 * float(key.abs().max())


def restored(keys: torch.Tensor, bits: int) -> torch.Tensor:
    return decode(*encode(keys, bits), bits)


@given(
    st.sampled_from(BITS),
    st.lists(st.floats(-300, 300, width=16), min_size=8, max_size=8),
    st.sampled_from([1.0, 1e-3, 100.0]),
)
def test_no_channel_is_off_by_more_than_half_a_step(bits, channels, factor):
    key = torch.tensor(channels) * factor
    scale, zero = encode(key, bits)[1].tolist()
    error = (restored(key, bits) - key).abs().max()
    assert float(error) <= bound(key, scale, zero, bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_format_by_definition(bits):
    """Channel by channel: codes from the least to the greatest signed number; a byte's channels lie a stride apart."""
    key = torch.randn(16, generator=torch.Generator().manual_seed(4))
    codes, (scale, zero) = encode(key, bits)
    middle, stride = 2 ** (bits - 1), 16 * bits // 8
    assert codes.dtype == torch.int8 and codes.shape == (stride,) and scale.dtype == torch.float16
    assert float(scale) == float(((key.max() - key.min()) / (2**bits - 1)).half())
    assert float(zero) == float((key.min() + middle * float(scale)).half())
    for channel, value in enumerate(key.tolist()):
        code = min(middle - 1, max(-middle, round((value - float(zero)) / float(scale))))
        stored = int(codes[channel % stride]) % 256 >> (channel // stride * bits) & (2**bits - 1)
        assert stored == code % 2**bits
        assert float(restored(key, bits)[channel]) == pytest.approx(
            code * float(scale) + float(zero), abs=1e-6
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-9])
def test_equal_channels_come_back(bits, value):
    assert torch.allclose(
        restored(torch.full((2, 8), value), bits), torch.tensor(value), rtol=HALF, atol=1e-7
    )


def test_more_bits_are_more_exact():
    keys = torch.randn(100, 64, generator=torch.Generator().manual_seed(5))
    errors = [float((restored(keys, bits) - keys).norm() / keys.norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.12 and errors[2] < 0.01


def make_cache(bits: int, **options) -> tuple[PagedKVCache, QuantisedKeysStore]:
    spec = QuantisedKeys(bits)
    cache = PagedKVCache(geometry(), tokens=64, slots=4, page_size=4, stores=[spec], **options)
    store = cache.stores[spec]
    assert isinstance(store, QuantisedKeysStore)
    return cache, store


def write(cache: PagedKVCache, slots: list[int], starts: list[int], count: int, seed: int) -> torch.Tensor:
    """Append random tokens to every layer; returns the keys ``[layers, batch, heads, count, dim]``."""
    slot_ids = torch.tensor(slots)
    positions = torch.tensor(starts)[:, None] + torch.arange(count)
    rows = cache.rows(slot_ids, positions)
    keys = torch.randn(2, len(slots), 2, count, 8, generator=torch.Generator().manual_seed(seed))
    for layer in range(2):
        cache.append(layer, slot_ids, positions, rows, keys[layer], keys[layer])
    for slot, start in zip(slots, starts, strict=True):
        cache.set_length(slot, start + count)
    return keys


@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_read_back_at_their_rows(bits):
    cache, store = make_cache(bits)
    slots = [cache.allocate(12) for _ in range(3)]
    keys = write(cache, slots, [0, 0, 0], 9, seed=1)
    later = write(cache, [slots[2], slots[0]], [9, 9], 2, seed=2)
    for layer in range(2):
        expected = restored(keys[layer], bits)  # [batch, heads, tokens, dim]
        copy = store.layers[layer]
        rows = cache.rows(torch.tensor(slots), torch.arange(9).expand(3, -1))
        assert torch.equal(copy.dequantise(rows), expected.transpose(1, 2))
        lists = torch.tensor([[[0, 8, 3], [7, 2, 1]]] * 3)
        picked = copy.gather(cache.rows(torch.tensor(slots), lists))
        assert torch.equal(picked, expected.gather(2, lists[..., None].expand(-1, -1, -1, 8)))
        rows = cache.rows(torch.tensor(slots[:1]), torch.tensor([[9, 10]]))
        assert torch.equal(copy.dequantise(rows)[0], restored(later[layer, 1], bits).transpose(0, 1))


def test_rejected_tokens_leave_no_trace():
    (plain, a), (rolled, b) = make_cache(4), make_cache(4)
    slots = [cache.allocate(16) for cache in (plain, rolled)]
    for cache, slot in zip((plain, rolled), slots, strict=True):
        write(cache, [slot], [0], 6, seed=1)
    write(rolled, [slots[1]], [6], 5, seed=2)
    rolled.set_length(slots[1], 6)
    for cache, slot in zip((plain, rolled), slots, strict=True):
        write(cache, [slot], [6], 5, seed=3)
    rows = plain.rows(torch.tensor(slots[:1]), torch.arange(11)[None])
    assert torch.equal(rows, rolled.rows(torch.tensor(slots[1:]), torch.arange(11)[None]))
    for layer in range(2):
        assert torch.equal(a.layers[layer].dequantise(rows), b.layers[layer].dequantise(rows))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes(bits, dtype):
    spec, shape = QuantisedKeys(bits), geometry(64, dtype)
    assert spec.entry_bytes(64) == 64 * bits // 8 + 4
    cache = PagedKVCache(shape, tokens=64, slots=2, stores=[spec])
    rows = cache.keys[0].shape[0]
    assert cache.stores[spec].nbytes == spec.nbytes(shape, rows) == rows * 2 * 2 * spec.entry_bytes(64)


def test_keys_of_half_precision_are_quantised_as_they_are_stored():
    for dtype in (torch.bfloat16, torch.float16):
        keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
        for got, expected in zip(encode(keys, 4), encode(keys.float(), 4), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(UsageError, match=f"bits={bits} is unknown; choose one of 2, 4, 8"):
        QuantisedKeys(bits)


def test_heads_that_do_not_fill_bytes_are_refused():
    with pytest.raises(UsageError, match="6 channels of 2 bits"):
        PagedKVCache(geometry(6), tokens=8, slots=1, stores=[QuantisedKeys(2)])
