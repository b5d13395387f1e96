# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.quantised_scores`."""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.quantised_keys_triton import load_codes, load_range
from specattn.kernels.split_kv_triton import absorb, arrive, join_lse, log_sum, pool_rows, share, whole


@triton.jit
def quantised_scores_kernel(
    query,  # [batch, ROWS, query_heads, D]
    codes,  # int8 [kv_heads, pool_size, D * BITS / 8]
    ranges,  # float16 pairs seen as int32, [kv_heads, pool_size]
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    lengths,  # int32 [batch]
    logits_out,  # [batch, ROWS, query_heads, logits_length]
    lse_out,  # float32 [batch, ROWS, query_heads]
    part_lse,  # float32 [batch, kv_heads, splits, BLOCK_M]
    arrivals,  # int32 [batch, kv_heads]
    places,  # int32 [query_heads], or None: nothing is exported
    export_logits,  # [batch, export_heads, export_length]
    export_lse,  # float32 [batch, export_heads]
    scaling,
    logits_length,
    export_length,
    pool_size,
    query_batch,  # strides, in elements
    query_row,
    query_head,
    table_slot,
    export_batch,
    export_head,
    export_lse_batch,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
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
    length = tl.load(lengths + request)
    pages = block_table + tl.load(slots + request).to(tl.int64) * table_slot
    half: tl.constexpr = D // 2

    m = tl.arange(0, BLOCK_M)
    row = m // GROUP
    head = kv_head * GROUP + m % GROUP
    live = m < ROWS * GROUP
    visible = tl.where(live, length - (ROWS - 1) + row, 0)
    at = request * query_batch + row * query_row + head * query_head
    at_half = at[:, None] + tl.arange(0, half)[None, :]
    q_first = tl.load(query + at_half, mask=live[:, None], other=0.0)
    q_second = tl.load(query + half + at_half, mask=live[:, None], other=0.0)
    q_sum = tl.sum(q_first.to(tl.float32) + q_second.to(tl.float32), 1)

    codes += kv_head.to(tl.int64) * pool_size * (D * BITS // 8)
    ranges += kv_head.to(tl.int64) * pool_size
    seen = visible > 0
    own = pool_rows(pages, visible - 1, seen, PAGE)
    own_first, own_second = load_codes(codes, own, seen, half, BITS)
    products = q_first.to(tl.float32) * own_first.to(tl.float32)
    products += q_second.to(tl.float32) * own_second.to(tl.float32)
    own_scale, own_zero = load_range(ranges, own, seen)
    anchor = (tl.sum(products, 1) * own_scale + q_sum * own_zero) * scaling

    score = (request * ROWS + row) * tl.num_programs(0) * GROUP + head
    if places is not None:
        place = tl.load(places + head, mask=row == ROWS - 1, other=-1)
        export_logits += request * export_batch
        export_lse += request * export_lse_batch

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first, last = share(length, tl.program_id(1), tl.num_programs(1), BLOCK_N)
    written_to = tl.minimum(whole(last), logits_length)
    exported_to = tl.minimum(whole(last), export_length)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        at_row = pool_rows(pages, n, inside, PAGE)
        k_first, k_second = load_codes(codes, at_row, inside, half, BITS)
        scale, zero = load_range(ranges, at_row, inside)
        dots = tl.dot(q_first, tl.trans(k_first.to(q_first.dtype)), input_precision="ieee")
        dots = tl.dot(q_second, tl.trans(k_second.to(q_first.dtype)), dots, input_precision="ieee")
        logits = (dots * scale[None, :] + q_sum[:, None] * zero[None, :]) * scaling - anchor[:, None]
        logits = tl.where(n[None, :] < visible[:, None], logits, float("-inf"))
        written = live[:, None] & (n < written_to)[None, :]
        to = logits_out + score[:, None] * logits_length + n[None, :]
        tl.store(to, logits.to(logits_out.dtype.element_ty), mask=written)
        if places is not None:
            wanted = (place >= 0)[:, None] & (n < exported_to)[None, :]
            to_export = export_logits + place[:, None].to(tl.int64) * export_head + n[None, :]
            tl.store(to_export, logits.to(export_logits.dtype.element_ty), mask=wanted)
        _, _, peak, total = absorb(logits, peak, total)

    first_part = unit * tl.num_programs(1) * BLOCK_M
    part = first_part + tl.program_id(1) * BLOCK_M + m
    tl.store(part_lse + part, log_sum(peak, total), mask=live)
    if arrive(arrivals + unit):
        lse = join_lse(part_lse + first_part, live, BLOCK_M, BLOCK_S)
        tl.store(lse_out + score, lse, mask=live)
        if places is not None:
            tl.store(export_lse + place, lse, mask=place >= 0)
