"""The quantised key copy against a plain reading of its definition: in Triton's interpreter, and on the GPU."""

from __future__ import annotations

import pytest
import torch
from draft_case import DEVICE, DTYPES, NAN

from specattn.errors import UsageError
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys, quantise_keys_reference

BITS = [4, 8]
SHAPES = [(1, 32), (2, 64), (3, 128), (8, 256)]


def pool(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, heads, head_dim, generator=generator) * 3 + torch.arange(head_dim) % 5
    return keys.to(DEVICE, dtype)


def poisoned(keys: torch.Tensor, bits: int) -> QuantisedKeys:
    copy = QuantisedKeys.empty(keys, bits)
    copy.codes.fill_(77)
    copy.ranges.fill_(NAN)
    return copy


def equal(a: QuantisedKeys, b: QuantisedKeys) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(
        a.ranges.view(torch.int16), b.ranges.view(torch.int16)
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads,head_dim", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_bit_for_bit_and_touches_no_other_row(bits, heads, head_dim, dtype):
    keys = pool(70, heads, head_dim, dtype)
    rows = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:45].view(9, 5).to(DEVICE)
    keys[[row for row in range(70) if row not in rows]] = NAN
    copies = [poisoned(keys, bits) for _ in range(2)]
    quantise_keys(keys, rows, copies[0])
    quantise_keys_reference(keys, rows, copies[1])
    assert equal(*copies)
    others = [row for row in range(70) if row not in rows]
    assert (copies[0].codes[:, others] == 77).all() and copies[0].ranges[:, others].isnan().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantise", [quantise_keys, quantise_keys_reference])
def test_a_channel_is_its_code_times_the_scale_plus_the_zero(bits, quantise):
    """Read by hand: unpacked one channel at a time, and no further from the key than half a step."""
    keys = pool(6, 2, 32)
    copy = poisoned(keys, bits)
    quantise(keys, torch.arange(6, device=DEVICE), copy)
    dequantised = copy.dequantise(torch.arange(6, device=DEVICE))
    for row in range(6):
        for head in range(2):
            scale, zero = copy.ranges[head, row].double().tolist()
            for channel in range(32):
                code = hand_code(copy.codes[head, row].tolist(), channel, bits)
                key = keys[row, head, channel].item()
                assert dequantised[row, head, channel].item() == pytest.approx(code * scale + zero, abs=1e-5)
                assert abs(code * scale + zero - key) <= 0.51 * scale + abs(zero) * 2**-10
            width = keys[row, head].max() - keys[row, head].min()
            assert scale == pytest.approx(float(width) / (2**bits - 1), rel=1e-3)


def hand_code(stored: list[int], channel: int, bits: int) -> int:
    if bits == 8:
        return stored[channel]
    byte = stored[channel % 16] % 256
    nibble = byte // 16 if channel >= 16 else byte % 16
    return nibble - 16 if nibble >= 8 else nibble


@pytest.mark.parametrize("bits", BITS)
def test_a_row_written_anew_keeps_nothing_of_what_was_rejected(bits):
    rejected, kept = pool(64, 2, 64, seed=1) * 50, pool(64, 2, 64, seed=2)
    rows = torch.arange(16, 48, device=DEVICE)
    copy, fresh = poisoned(kept, bits), poisoned(kept, bits)
    quantise_keys(rejected, rows, copy)
    quantise_keys(kept, rows, copy)
    quantise_keys(kept, rows, fresh)
    assert equal(copy, fresh)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 3.25, -1e-6])
def test_a_key_of_equal_channels(bits, value):
    keys = torch.full((4, 1, 32), value, device=DEVICE)
    copy = poisoned(keys, bits)
    quantise_keys(keys, torch.arange(4, device=DEVICE), copy)
    assert (copy.dequantise(torch.arange(4, device=DEVICE)) - value).abs().max() < 1e-7


def test_padding_may_name_a_row_of_page_0_many_times():
    keys = pool(40, 2, 32)
    rows = torch.tensor([0, 0, 0, 17, 0], device=DEVICE)
    copies = [poisoned(keys, 4) for _ in range(2)]
    quantise_keys(keys, rows, copies[0])
    quantise_keys_reference(keys, torch.tensor([0, 17], device=DEVICE), copies[1])
    assert equal(*copies)


def test_a_copy_of_4_bits_costs_half_a_byte_a_channel_and_4_bytes_a_token():
    keys = pool(48, 2, 64, torch.float16)
    assert QuantisedKeys.empty(keys, 4).nbytes == 48 * 2 * (32 + 4)
    assert QuantisedKeys.empty(keys, 8).nbytes == 48 * 2 * (64 + 4)


def test_what_does_not_fit_is_refused():
    keys = pool(16, 2, 64)
    rows = torch.arange(3, device=DEVICE)
    with pytest.raises(UsageError, match="bits=3 is unknown"):
        QuantisedKeys.empty(keys, 3)
    with pytest.raises(UsageError, match="bits=2: the kernels take 4 or 8"):
        quantise_keys(keys, rows, QuantisedKeys.empty(keys, 2))
    with pytest.raises(UsageError, match="codes has shape"):
        quantise_keys(keys, rows, QuantisedKeys.empty(pool(17, 2, 64), 4))
    with pytest.raises(UsageError, match="contiguous"):
        quantise_keys(keys.transpose(0, 1), rows, QuantisedKeys.empty(keys.transpose(0, 1), 4))
    odd = pool(16, 2, 48)
    with pytest.raises(UsageError, match="head_dim=48"):
        quantise_keys(odd, rows, QuantisedKeys.empty(odd, 4))
