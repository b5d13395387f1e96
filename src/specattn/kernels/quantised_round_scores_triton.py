# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.quantised_round_scores`.

It is bound by instructions as much as by bytes, and that is why it is as it is:

- *Tokens are the rows of its products.* A thread then holds few tokens and, of each, a head's rows side by side: the
  mean over rows is three additions within a thread, and the mean over heads two exchanges.
- *Codes are read in words of 16 bits* and become float16 without a conversion: a code's bits are put below those of
  1024, where neighbouring numbers differ by 1, and what is too much is subtracted. That is exact, and two codes take
  two instructions. Even and odd codes go to products of their own, with every other channel of the queries.
- *Tiles that all rows see whole* have no masks.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from specattn.kernels.quantised_keys_triton import load_range
from specattn.kernels.split_kv_triton import pool_rows

LOG2_E = tl.constexpr(math.log2(math.e))

# Pairs of words in, a pair of float16 codes out for each code of a word. 0x6400 is 1024 in float16, with code + 8 or
# code + 128 in the lowest bits; a code in bits 4 to 7 counts 16 times, which the multiplication by 1/16 undoes.
UNPACK_4 = tl.constexpr(
    """{
    .reg .b32 high, offset, sixteenth, shift;
    mov.b32 offset, 0x64086408;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 shift, 0xD480D480;
    shr.u32 high, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 $1, $4, 0x00F000F0, 0x64806480, 0x6a;
    lop3.b32 $2, high, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 $3, high, 0x00F000F0, 0x64806480, 0x6a;
    sub.f16x2 $0, $0, offset;
    fma.rn.f16x2 $1, $1, sixteenth, shift;
    sub.f16x2 $2, $2, offset;
    fma.rn.f16x2 $3, $3, sixteenth, shift;
    }"""
)
UNPACK_8 = tl.constexpr(
    """{
    .reg .b32 high, offset;
    mov.b32 offset, 0x64806480;
    shr.u32 high, $2, 8;
    lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6a;
    lop3.b32 $1, high, 0x00FF00FF, 0x64806480, 0x6a;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    }"""
)


@triton.jit
def quantised_round_scores_kernel(
    query,  # [ROWS, layers, batch, query_heads, D], heads contiguous
    codes,  # int16 [layers * KV_HEADS, pool_size, D * BITS / 16]
    ranges,  # float16 pairs seen as int32, [layers * KV_HEADS, pool_size]
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    lengths,  # int32 [batch]
    lse,  # float32 [ROWS, layers, batch, query_heads], heads contiguous
    places,  # int32 [layers, query_heads]
    heads_out,  # [batch, export_heads, length]
    own_out,  # [slots, layers * KV_HEADS, length]
    due,  # bool [batch, layers * KV_HEADS], or None: all are
    scaling,
    length,
    pool_size,
    query_row,  # strides, in elements
    query_layer,
    query_batch,
    lse_row,
    lse_layer,
    lse_batch,
    table_slot,
    heads_batch,
    heads_head,
    own_slot,
    own_head,
    due_batch,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BEHIND: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,  # whether codes are unpacked in pairs, which the interpreter cannot
):
    """Grid: stretches of ``TILES`` tiles, KV heads of all layers, requests."""
    own_row = tl.program_id(1).to(tl.int64)
    layer = own_row // KV_HEADS
    first_head = own_row % KV_HEADS * GROUP
    request = tl.program_id(2).to(tl.int64)
    if due is not None:  # noqa: SIM102 - `and` would compile what there is not
        if tl.load(due + request * due_batch + own_row) == 0:
            return
    visible = tl.load(lengths + request).to(tl.int32)
    slot = tl.load(slots + request).to(tl.int64)
    pages = block_table + slot * table_slot
    codes += own_row * pool_size * (D * BITS // 16)
    ranges += own_row * pool_size

    m = tl.arange(0, BLOCK_R * BLOCK_G)
    row = m // BLOCK_G
    live = (row < ROWS) & (m % BLOCK_G < GROUP)
    head = first_head + m % BLOCK_G
    query += layer * query_layer + request * query_batch + row * query_row + head * D
    q0 = _channels(query, live, 0, D, BITS)
    q1 = _channels(query, live, 1, D, BITS)
    q2 = _channels(query, live, 2 if BITS == 4 else 0, D, BITS)
    q3 = _channels(query, live, 3 if BITS == 4 else 1, D, BITS)
    whole_query = tl.load(query[:, None] + tl.arange(0, D)[None, :], mask=live[:, None], other=0.0)
    q_sum = tl.sum(whole_query.to(tl.float32), 1)
    lse += layer * lse_layer + request * lse_batch + row * lse_row + head
    # Of rows that are none infinite: their weights are 0. The mean's divisor is in it too.
    total = tl.load(lse, mask=live, other=float("inf")) * LOG2_E + tl.log2(ROWS * 1.0)
    seen = visible - (ROWS - 1) + row

    g = tl.arange(0, BLOCK_G)
    place = tl.load(places + layer * KV_HEADS * GROUP + first_head + g, mask=g < GROUP, other=-1)
    heads_out += request * heads_batch + place.to(tl.int64) * heads_head
    own_out += slot * own_slot + own_row * own_head

    first = tl.program_id(0) * (TILES * BLOCK_N)
    last = tl.minimum(tl.minimum(first + TILES * BLOCK_N, visible + BEHIND), length)
    seen_by_all = tl.minimum(tl.minimum(visible - (ROWS - 1), last), length)
    whole = first + tl.maximum(seen_by_all - first, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
        _tile(
            start, q0, q1, q2, q3, q_sum, total, seen, codes, ranges, pages, heads_out, own_out, place >= 0,
            scaling * LOG2_E, visible, length, False, ROWS, GROUP, D, BITS, PAGE, BLOCK_R, BLOCK_G, BLOCK_N, PTX,
        )  # fmt: skip
    for start in tl.range(whole, last, BLOCK_N, num_stages=1):
        _tile(
            start, q0, q1, q2, q3, q_sum, total, seen, codes, ranges, pages, heads_out, own_out, place >= 0,
            scaling * LOG2_E, visible, length, True, ROWS, GROUP, D, BITS, PAGE, BLOCK_R, BLOCK_G, BLOCK_N, PTX,
        )  # fmt: skip


@triton.jit
def _tile(
    start, q0, q1, q2, q3, q_sum, total, seen, codes, ranges, pages, heads_out, own_out, exported,
    factor, visible, length, MASKED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens from ``start`` on; ``MASKED`` where some rows may not see some of them."""
    words: tl.constexpr = D * BITS // 16
    n = start + tl.arange(0, BLOCK_N)
    # Masks that are known to hold are dropped by the compiler.
    inside = n < visible if MASKED else tl.full([BLOCK_N], True, tl.int1)
    written = n < length if MASKED else tl.full([BLOCK_N], True, tl.int1)
    at_row = pool_rows(pages, n, inside, PAGE)
    scale, zero = load_range(ranges, at_row, inside)
    word = tl.arange(0, words)
    packed = tl.load(codes + at_row[:, None] * words + word[None, :], mask=inside[:, None], other=0)
    dots = _products(packed, q0, q1, q2, q3, BITS, PTX)
    shift = (zero * factor)[:, None] * q_sum[None, :] - total[None, :]
    # A quantised key's logit can be above the log-sum-exp of the exact ones: no probability is above 1 for that.
    p = tl.exp2(tl.minimum(dots * (scale * factor)[:, None] + shift, -tl.log2(ROWS * 1.0)))
    if MASKED:
        p = tl.where(n[:, None] < seen[None, :], p, 0.0)
    mean = tl.sum(tl.reshape(p, [BLOCK_N, BLOCK_R, BLOCK_G]), 1)
    own = tl.sum(mean, 1) * (1 / GROUP)
    tl.store(own_out + n, own.to(own_out.dtype.element_ty), mask=written)
    to = heads_out[None, :] + n[:, None]
    tl.store(to, mean.to(heads_out.dtype.element_ty), mask=exported[None, :] & written[:, None])


@triton.jit
def _channels(query, live, CODE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """The channels ``[words, M]`` of the queries whose codes are number ``CODE`` in their words."""
    word = tl.arange(0, D * BITS // 16)
    # A byte of two codes holds channels that lie half a head apart.
    channel = 2 * word + CODE % 2 * (D // 2) + CODE // 2 if BITS == 4 else 2 * word + CODE
    q = tl.load(query[None, :] + channel[:, None], mask=live[None, :], other=0.0)
    return q if q.dtype == tl.float32 else q.to(tl.float16)


@triton.jit
def _products(packed, q0, q1, q2, q3, BITS: tl.constexpr, PTX: tl.constexpr):
    """Products ``[N, M]`` of the codes in ``packed`` words ``[N, words]`` with the queries."""
    if BITS == 4:
        if PTX:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                UNPACK_4,
                "=r,=r,=r,=r,r",
                [packed],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            c0, c1 = _code(packed, 0, 4), _code(packed, 1, 4)
            c2, c3 = _code(packed, 2, 4), _code(packed, 3, 4)
        dots = tl.dot(c0.to(q0.dtype), q0, input_precision="ieee")
        dots = tl.dot(c1.to(q0.dtype), q1, dots, input_precision="ieee")
        dots = tl.dot(c2.to(q0.dtype), q2, dots, input_precision="ieee")
        return tl.dot(c3.to(q0.dtype), q3, dots, input_precision="ieee")
    else:
        if PTX:
            c0, c1 = tl.inline_asm_elementwise(
                UNPACK_8, "=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
        else:
            c0, c1 = _code(packed, 0, 8), _code(packed, 1, 8)
        dots = tl.dot(c0.to(q0.dtype), q0, input_precision="ieee")
        return tl.dot(c1.to(q0.dtype), q1, dots, input_precision="ieee")


@triton.jit
def _code(packed, CODE: tl.constexpr, BITS: tl.constexpr):
    """Number ``CODE`` of the codes in each word, float16: what the assembly does, for one word at a time."""
    middle: tl.constexpr = 2 ** (BITS - 1)
    bits = ((packed >> (CODE * BITS)) & (2 * middle - 1)) ^ (0x6400 + middle)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + middle)
