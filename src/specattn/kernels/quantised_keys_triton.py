# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.quantised_keys`, and how other kernels read the codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantise_keys_kernel(
    keys,  # [pool_rows, kv_heads, D]
    rows,  # [count]
    codes,  # int8 [kv_heads, pool_rows, D * BITS / 8]
    ranges,  # float16 [kv_heads, pool_rows, 2]
    count,
    pool_rows,
    pool_row,  # stride, in elements
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of rows, KV heads."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < count
    head = tl.program_id(1)
    half = tl.arange(0, D // 2)
    row = tl.load(rows + token, mask=mask, other=0).to(tl.int64)
    at = keys + row[:, None] * pool_row + head * D + half[None, :]
    first = tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=mask[:, None], other=0.0).to(tl.float32)

    store_codes(first, second, codes, ranges, head.to(tl.int64) * pool_rows + row, mask, D, BITS)


@triton.jit
def store_codes(first, second, codes, ranges, entry, mask, D: tl.constexpr, BITS: tl.constexpr):
    """Quantise keys, whose halves are float32 ``[N, D / 2]``, to ``entry`` ``[N]`` of all heads' pool rows."""
    middle: tl.constexpr = 2 ** (BITS - 1)
    low = tl.min(tl.minimum(first, second), 1)
    high = tl.max(tl.maximum(first, second), 1)
    scale = tl.div_rn(high - low, tl.full(low.shape, 2 * middle - 1, tl.float32)).to(tl.float16)
    zero = (low + middle * scale.to(tl.float32)).to(tl.float16)
    tl.store(ranges + 2 * entry, scale, mask=mask)
    tl.store(ranges + 2 * entry + 1, zero, mask=mask)

    first = _encode(first, scale.to(tl.float32), zero.to(tl.float32), middle)
    second = _encode(second, scale.to(tl.float32), zero.to(tl.float32), middle)
    to = codes + entry[:, None] * (D * BITS // 8) + tl.arange(0, D // 2)[None, :]
    if BITS == 4:
        tl.store(to, (first & 15) | (second << 4), mask=mask[:, None])
    else:
        tl.store(to, first, mask=mask[:, None])
        tl.store(to + D // 2, second, mask=mask[:, None])


@triton.jit
def _encode(keys, scale, zero, middle: tl.constexpr):
    """Codes, int8, of ``keys`` ``[N, C]``; divided as IEEE demands, so that the reference gives the same."""
    step = tl.where(scale == 0.0, 1.0, scale)
    steps = tl.div_rn(keys - zero[:, None], tl.broadcast_to(step[:, None], keys.shape))
    return tl.clamp(tl.floor(steps + 0.5), -middle, middle - 1).to(tl.int8)


@triton.jit
def load_codes(codes, row, mask, HALF: tl.constexpr, BITS: tl.constexpr):
    """Codes, int8 ``[N, HALF]`` each, of the first and the second half of the channels of pool ``row`` ``[N]``."""
    channel = tl.arange(0, HALF)[None, :]
    if BITS == 4:
        packed = tl.load(codes + row[:, None] * HALF + channel, mask=mask[:, None], other=0)
        return (packed << 4) >> 4, packed >> 4
    else:
        at = codes + row[:, None] * (2 * HALF) + channel
        first = tl.load(at, mask=mask[:, None], other=0)
        return first, tl.load(at + HALF, mask=mask[:, None], other=0)


@triton.jit
def load_range(ranges, row, mask):
    """Scale and zero, float32, of pool ``row``; ``ranges`` are the float16 pairs seen as int32."""
    both = tl.load(ranges + row, mask=mask, other=0)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True)
    zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)
