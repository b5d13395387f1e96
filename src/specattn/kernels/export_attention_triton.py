# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.export_attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.split_kv_triton import (
    absorb,
    arrive,
    join_lse,
    join_outputs,
    log_sum,
    pool_rows,
    positive,
    share,
    whole,
)


@triton.jit
def export_attention_kernel(
    query,  # [batch, ROWS, query_heads, D]
    keys,  # [pool_rows, kv_heads, D]
    values,
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    lengths,  # int32 [batch]
    out,  # [batch, ROWS, query_heads, D], contiguous
    parts,  # float32 [batch, kv_heads, splits, BLOCK_M, D]
    part_lse,  # float32 [batch, kv_heads, splits, BLOCK_M]
    arrivals,  # int32 [batch, kv_heads]
    places,  # int32 [query_heads], or None: nothing is exported
    logits_out,  # [batch, export_heads, export_length]
    lse_out,  # float32 [batch, export_heads]
    scaling,
    export_length,
    query_batch,  # strides, in elements
    query_row,
    query_head,
    pool_row,
    table_slot,
    logits_batch,
    logits_head,
    lse_batch,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: KV heads, splits, requests. Neighbouring programs read both halves of the same pool rows."""
    kv_head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    unit = request * tl.num_programs(0) + kv_head
    length = tl.load(lengths + request)
    pages = block_table + tl.load(slots + request).to(tl.int64) * table_slot

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    row = m // GROUP
    head = kv_head * GROUP + m % GROUP
    live = m < ROWS * GROUP
    visible = tl.where(live, length - (ROWS - 1) + row, 0)
    at = request * query_batch + row * query_row + head * query_head
    q = tl.load(query + at[:, None] + d[None, :], mask=live[:, None], other=0.0)

    keys += kv_head * D
    values += kv_head * D
    anchor = tl.zeros([BLOCK_M], tl.float32)
    if places is not None:
        # The last row's scores alone leave the kernel.
        place = tl.load(places + head, mask=row == ROWS - 1, other=-1)
        own = pool_rows(pages, visible - 1, visible > 0, PAGE)
        own_key = tl.load(keys + own[:, None] * pool_row + d[None, :], mask=(visible > 0)[:, None], other=0.0)
        anchor = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), 1) * scaling
        logits_out += request * logits_batch
        lse_out += request * lse_batch

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    first, last = share(length, tl.program_id(1), tl.num_programs(1), BLOCK_N)
    exported_to = tl.minimum(whole(last), export_length)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        at_row = pool_rows(pages, n, inside, PAGE)[:, None] * pool_row + d[None, :]
        k = tl.load(keys + at_row, mask=inside[:, None], other=0.0)
        v = tl.load(values + at_row, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling - anchor[:, None]
        logits = tl.where(n[None, :] < visible[:, None], logits, float("-inf"))
        if places is not None:
            wanted = (place >= 0)[:, None] & (n < exported_to)[None, :]
            to = logits_out + place[:, None].to(tl.int64) * logits_head + n[None, :]
            tl.store(to, logits.to(logits_out.dtype.element_ty), mask=wanted)
        weights, keep, peak, total = absorb(logits, peak, total)
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")

    part = (unit * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + m
    tl.store(parts + part[:, None] * D + d[None, :], acc / positive(total)[:, None], mask=live[:, None])
    tl.store(part_lse + part, log_sum(peak, total), mask=live)
    if arrive(arrivals + unit):
        first_part = unit * tl.num_programs(1) * BLOCK_M
        part_lse += first_part
        lse = join_lse(part_lse, live, BLOCK_M, BLOCK_S)
        chunk: tl.constexpr = max(1, 8192 // (BLOCK_M * D))
        result = join_outputs(parts + first_part * D, part_lse, lse, live, BLOCK_M, D, chunk)
        to = ((request * ROWS + row) * tl.num_programs(0) * GROUP + head) * D
        tl.store(out + to[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=live[:, None])
        if places is not None:
            tl.store(lse_out + place, lse, mask=place >= 0)
