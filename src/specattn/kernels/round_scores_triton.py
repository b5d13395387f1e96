# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.round_scores`."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from specattn.kernels.split_kv_triton import pool_rows

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def round_scores_kernel(
    query,  # [ROWS, layers, batch, query_heads, D], heads contiguous
    keys,  # [layers, pool_rows, KV_HEADS, D]
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
    query_row,  # strides, in elements
    query_layer,
    query_batch,
    lse_row,
    lse_layer,
    lse_batch,
    pool_layer,
    pool_row,
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
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid: stretches of ``TILES`` tiles, KV heads of all layers, requests."""
    # Of many heads few are due, and of a long buffer few tokens may be there: such programs end after a load or two.
    own_row = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    if due is not None:  # noqa: SIM102 - `and` would compile what there is not
        if tl.load(due + request * due_batch + own_row) == 0:
            return
    visible = tl.load(lengths + request)
    first = tl.program_id(0) * (TILES * BLOCK_N)
    # One tile behind the last token is set to 0 too: what the next round adds to the list must not find old scores.
    last = tl.minimum(tl.minimum(first + TILES * BLOCK_N, visible + BLOCK_N), length)
    if first >= last:
        return
    layer = own_row // KV_HEADS
    kv_head = own_row % KV_HEADS
    slot = tl.load(slots + request).to(tl.int64)
    pages = block_table + slot * table_slot

    m = tl.arange(0, BLOCK_R * BLOCK_G)
    row = m // BLOCK_G
    live = (row < ROWS) & (m % BLOCK_G < GROUP)
    head = kv_head * GROUP + m % BLOCK_G
    d = tl.arange(0, D)
    query += layer * query_layer + request * query_batch
    at = row.to(tl.int64) * query_row + head * D
    q = tl.load(query + at[:, None] + d[None, :], mask=live[:, None], other=0.0)
    lse += layer * lse_layer + request * lse_batch
    total = tl.load(lse + row.to(tl.int64) * lse_row + head, mask=live, other=float("inf"))
    total = total * LOG2_E + tl.log2(ROWS * 1.0)
    seen = tl.where(live, visible - (ROWS - 1) + row, 0)

    g = tl.arange(0, BLOCK_G)
    place = tl.load(places + own_row * GROUP + g, mask=g < GROUP, other=-1)
    heads_out += request * heads_batch + place.to(tl.int64) * heads_head
    own_out += slot * own_slot + own_row * own_head
    keys += layer * pool_layer + kv_head * D
    q = tl.trans(q)
    scaling *= LOG2_E
    whole = first + tl.maximum(tl.minimum(visible - (ROWS - 1), last) - first, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(first, whole, BLOCK_N):
        _tile(
            start, q, total, seen, keys, pages, heads_out, own_out, place >= 0, scaling, visible, length, pool_row,
            False, ROWS, GROUP, D, PAGE, BLOCK_R, BLOCK_G, BLOCK_N,
        )  # fmt: skip
    for start in tl.range(whole, last, BLOCK_N, num_stages=1):
        _tile(
            start, q, total, seen, keys, pages, heads_out, own_out, place >= 0, scaling, visible, length, pool_row,
            True, ROWS, GROUP, D, PAGE, BLOCK_R, BLOCK_G, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _tile(
    start, q, total, seen, keys, pages, heads_out, own_out, exported, scaling, visible, length, pool_row,
    MASKED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens from ``start`` on; ``MASKED`` where some rows may not see some of them."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    # Masks that are known to hold are dropped by the compiler.
    inside = n < visible if MASKED else tl.full([BLOCK_N], True, tl.int1)
    written = n < length if MASKED else tl.full([BLOCK_N], True, tl.int1)
    at_row = pool_rows(pages, n, inside, PAGE)
    k = tl.load(keys + at_row[:, None] * pool_row + d[None, :], mask=inside[:, None], other=0.0)
    # Tokens are the rows of the product, so that a thread has a head's rows side by side.
    logits = tl.dot(k, q, input_precision="ieee") * scaling - total[None, :]
    p = tl.exp2(tl.minimum(logits, -tl.log2(ROWS * 1.0)))
    if MASKED:
        p = tl.where(n[:, None] < seen[None, :], p, 0.0)
    mean = tl.sum(tl.reshape(p, [BLOCK_N, BLOCK_R, BLOCK_G]), 1)
    own = tl.sum(mean, 1) * (1 / GROUP)
    tl.store(own_out + n, own.to(own_out.dtype.element_ty), mask=written)
    to = heads_out[None, :] + n[:, None]
    tl.store(to, mean.to(heads_out.dtype.element_ty), mask=exported[None, :] & written[:, None])
