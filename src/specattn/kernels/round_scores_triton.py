# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.round_scores`."""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.split_kv_triton import pool_rows


@triton.jit
def round_scores_kernel(
    query,  # [batch, ROWS, query_heads, D], heads contiguous
    keys,  # [pool_rows, kv_heads, D]
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    lengths,  # int32 [batch]
    lse,  # float32 [batch, ROWS, query_heads], heads contiguous
    places,  # int32 [query_heads]
    heads_out,  # [batch, export_heads, length]
    own_out,  # [slots, kv_heads, length]
    scaling,
    length,
    query_batch,  # strides, in elements
    query_row,
    lse_batch,
    lse_row,
    pool_row,
    table_slot,
    heads_batch,
    heads_head,
    own_slot,
    own_head,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid: stretches of ``TILES`` tiles, KV heads, requests."""
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    visible = tl.load(lengths + request)
    first = tl.program_id(0) * (TILES * BLOCK_N)
    # One tile behind the last token is set to 0 too: what the next round adds to the list must not find old scores.
    last = tl.minimum(tl.minimum(first + TILES * BLOCK_N, visible + BLOCK_N), length)
    slot = tl.load(slots + request).to(tl.int64)
    pages = block_table + slot * table_slot

    m = tl.arange(0, BLOCK_R * BLOCK_G)
    row = m // BLOCK_G
    live = (row < ROWS) & (m % BLOCK_G < GROUP)
    head = kv_head * GROUP + m % BLOCK_G
    d = tl.arange(0, D)
    at = request * query_batch + row * query_row + head * D
    q = tl.load(query + at[:, None] + d[None, :], mask=live[:, None], other=0.0)
    total = tl.load(lse + request * lse_batch + row * lse_row + head, mask=live, other=float("inf"))
    seen = tl.where(live, visible - (ROWS - 1) + row, 0)

    g = tl.arange(0, BLOCK_G)
    place = tl.load(places + kv_head * GROUP + g, mask=g < GROUP, other=-1)
    heads_out += request * heads_batch + place.to(tl.int64)[:, None] * heads_head
    own_out += slot * own_slot + kv_head * own_head
    keys += kv_head * D
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at_row = pool_rows(pages, n, n < visible, PAGE)
        k = tl.load(keys + at_row[:, None] * pool_row + d[None, :], mask=(n < visible)[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling - total[:, None]
        p = tl.where(n[None, :] < seen[:, None], tl.exp(logits), 0.0)
        mean = tl.sum(tl.reshape(p, [BLOCK_R, BLOCK_G, BLOCK_N]), 0) * (1 / ROWS)
        inside = n < length
        exported = (place >= 0)[:, None] & inside[None, :]
        tl.store(heads_out + n[None, :], mean.to(heads_out.dtype.element_ty), mask=exported)
        own = tl.sum(mean, 0) * (1 / GROUP)
        tl.store(own_out + n, own.to(own_out.dtype.element_ty), mask=inside)
