# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.value_attention`."""

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
)


@triton.jit
def value_attention_kernel(
    logits_in,  # [batch, ROWS, query_heads, length]
    values,  # [pool_rows, kv_heads, D]
    indices,  # int32 [batch, kv_heads, capacity]
    counts,  # int32 [batch, kv_heads]
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    out,  # [batch, ROWS, query_heads, D], contiguous
    parts,  # float32 [batch, kv_heads, splits, BLOCK_M, D]
    part_lse,  # float32 [batch, kv_heads, splits, BLOCK_M]
    arrivals,  # int32 [batch, kv_heads]
    length,
    list_batch,  # strides, in elements
    list_head,
    pool_row,
    table_slot,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: KV heads, splits, requests."""
    kv_head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    unit = request * tl.num_programs(0) + kv_head
    count = tl.load(counts + unit)
    pages = block_table + tl.load(slots + request).to(tl.int64) * table_slot
    indices += request * list_batch + kv_head * list_head
    values += kv_head * D

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    live = m < ROWS * GROUP
    query_row = (request * ROWS + m // GROUP) * tl.num_programs(0) * GROUP + kv_head * GROUP + m % GROUP

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    first, last = share(count, tl.program_id(1), tl.num_programs(1), BLOCK_N)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        token = tl.load(indices + n, mask=inside, other=0)
        at_row = pool_rows(pages, token, inside, PAGE)
        v = tl.load(values + at_row[:, None] * pool_row + d[None, :], mask=inside[:, None], other=0.0)
        logits = tl.load(
            logits_in + query_row[:, None] * length + token[None, :],
            mask=live[:, None] & inside[None, :],
            other=float("-inf"),
        ).to(tl.float32)
        weights, keep, peak, total = absorb(logits, peak, total)
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")

    first_part = unit * tl.num_programs(1) * BLOCK_M
    part = first_part + tl.program_id(1) * BLOCK_M + m
    tl.store(parts + part[:, None] * D + d[None, :], acc / positive(total)[:, None], mask=live[:, None])
    tl.store(part_lse + part, log_sum(peak, total), mask=live)
    if arrive(arrivals + unit):
        part_lse += first_part
        lse = join_lse(part_lse, live, BLOCK_M, BLOCK_S)
        chunk: tl.constexpr = max(1, 8192 // (BLOCK_M * D))
        result = join_outputs(parts + first_part * D, part_lse, lse, live, BLOCK_M, D, chunk)
        to = query_row[:, None] * D + d[None, :]
        tl.store(out + to, result.to(out.dtype.element_ty), mask=live[:, None])
