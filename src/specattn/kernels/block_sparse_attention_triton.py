# mypy: disable-error-code="no-untyped-def"
"""The Triton side of :mod:`specattn.kernels.block_sparse_launch`.

A program has one query block and goes through its list; the longest lists of a head, those of the last rows, begin
first. Of a causal list only the last blocks need a mask, so the list is taken in two stretches, of which the first
has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# What changes from chunk to chunk is not specialised, so that a kernel is compiled once for a model.
VARYING = ["start", "rows", "length", "capacity"]


@triton.jit(do_not_specialize=VARYING)
def block_sparse_kernel(
    query,  # [batch, query_heads, rows, HEAD_DIM]
    key,  # [batch, kv_heads, length, HEAD_DIM]
    value,
    query_scales,  # float32 [batch, query_heads, query_blocks], or None
    key_scales,  # float32 [batch, kv_heads, key_blocks], or None
    lam,  # float32 [query_heads], or None: nothing is skipped
    indices,  # int32 [batch, query_heads, query_blocks, capacity]
    counts,  # int32 [batch, query_heads, query_blocks]
    out,  # [batch, query_heads, rows, HEAD_DIM]
    skipped,  # int32 [batch, query_heads, query_blocks]
    scaling,
    start,
    rows,
    length,
    kv_heads,
    capacity,
    query_batch,  # strides, in elements
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    out_batch,
    out_head,
    out_row,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Grid: query blocks, query heads, requests."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // (tl.num_programs(1) // kv_heads)
    unit = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block

    dims = tl.arange(0, BLOCK_D)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (dims < HEAD_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * query_row + dims[None, :]
    q = tl.load(query + batch * query_batch + head * query_head + at, mask=live, other=0)
    last_seen = tl.full([BLOCK_M], 0, tl.int32) + length - 1
    seen_by_all = length
    if CAUSAL:
        last_seen = tl.minimum(start + row, last_seen)
        seen_by_all = tl.minimum(start + block * BLOCK_M + 1, length)
    last_seen = tl.where(row < rows, last_seen, -1)

    factor = scaling * LOG2_E  # exponentials are powers of two here
    if query_scales is not None:
        factor *= tl.load(query_scales + unit)
        key_scales += (batch * kv_heads + kv_head) * tl.cdiv(length, BLOCK_N)
    patience = float("inf")
    if lam is not None:
        patience = tl.load(lam + head) * LOG2_E

    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    entries = indices + unit * capacity
    count = tl.load(counts + unit)
    whole = _entries_before(seen_by_all // BLOCK_N, entries, count, LISTED)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    skips = tl.zeros([BLOCK_M], tl.int32)
    for masked in tl.static_range(2):
        high, total, acc, skips = _attend(
            high,
            total,
            acc,
            skips,
            q,
            key,
            value,
            key_scales,
            entries,
            whole if masked else 0,
            count if masked else whole,
            last_seen,
            factor,
            patience,
            length,
            key_row,
            value_row,
            lam is not None,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            ROW_GROUP,
            masked,
        )
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = row.to(tl.int64)[:, None] * out_row + dims[None, :]
    tl.store(out + batch * out_batch + head * out_head + at, result.to(out.dtype.element_ty), mask=live)
    tl.store(skipped + unit, tl.sum(skips))


@triton.jit
def _attend(
    high,  # [BLOCK_M]: the largest logit so far
    total,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_D]
    skips,  # int32 [BLOCK_M]: visible keys whose values were skipped
    q,
    key,
    value,
    key_scales,
    entries,
    first,
    stop,
    last_seen,
    factor,
    patience,
    length,
    key_row,
    value_row,
    SKIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The entries ``first`` to ``stop`` of a list; without a mask all rows see all of their blocks."""
    block = tl.load(entries + first, mask=first < stop, other=0)
    # Loads that only a branch uses are not fetched ahead, those that are handed on to the next iteration are. Behind
    # the last entry that is block 0, which may be longer than all keys: so these loads have a mask.
    if SKIPS:
        v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    for entry in range(first, stop):
        k = _tile(key, block, key_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
        if not SKIPS:
            v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
        scale = factor
        if key_scales is not None:
            scale *= tl.load(key_scales + block)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        if MASKED:
            token = block * BLOCK_N + tl.arange(0, BLOCK_N)
            logits = tl.where(token[None, :] <= last_seen[:, None], logits, float("-inf"))
        local = tl.max(logits, 1)
        higher = tl.maximum(high, local)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - base[:, None])
        keep = tl.exp2(high - base)
        total = total * keep + tl.sum(p, 1)
        high = higher
        if SKIPS:
            visible = tl.minimum(tl.maximum(last_seen - block * BLOCK_N + 1, 0), BLOCK_N)
            nearest = _nearest(tl.where(visible > 0, local - base, float("-inf")), BLOCK_M, ROW_GROUP)
            skip = nearest < -patience
            skips += tl.where(skip, visible, 0)
            # Where all rows skip, no maximum has moved, and keep is 1.
            if tl.max(nearest, 0) >= -patience:
                p = tl.where(skip[:, None], 0.0, p)
                acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        block = tl.load(entries + entry + 1, mask=entry + 1 < stop, other=0)
        if SKIPS:
            v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    return high, total, acc, skips


@triton.jit
def _nearest(gap, BLOCK_M: tl.constexpr, ROW_GROUP: tl.constexpr):
    """For each row of ``gap`` ``[BLOCK_M]`` the largest of its group."""
    groups: tl.constexpr = BLOCK_M // ROW_GROUP
    largest = tl.max(tl.reshape(gap, [groups, ROW_GROUP]), 1)
    return tl.reshape(tl.broadcast_to(largest[:, None], [groups, ROW_GROUP]), [BLOCK_M])


@triton.jit
def _tile(
    tokens,
    block,
    stride,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A block of keys or values ``[BLOCK_N, BLOCK_D]``, filled up with zeros."""
    lanes = tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    at = tokens + (block * BLOCK_N).to(tl.int64) * stride + (lanes * stride + dims)
    if MASKED or HEAD_DIM != BLOCK_D:
        return tl.load(at, mask=(block * BLOCK_N + lanes < length) & (dims < HEAD_DIM), other=0)
    else:
        return tl.load(at)


@triton.jit
def _entries_before(limit, entries, count, LISTED: tl.constexpr):
    """How many entries of a list, which ascends, are below ``limit``."""
    found = 0
    for first in range(0, count, LISTED):
        at = first + tl.arange(0, LISTED)
        block = tl.load(entries + at, mask=at < count, other=limit)
        found += tl.sum((block < limit).to(tl.int32))
    return found
