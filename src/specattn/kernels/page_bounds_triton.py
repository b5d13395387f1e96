# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.page_bounds`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_bounds_kernel(
    keys,  # [pool_rows, kv_heads, D]
    lower,  # [pages, kv_heads, D]
    upper,
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    lengths,  # int32 [batch]
    appended,
    pool_row,  # strides, in elements
    table_slot,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid: KV heads, touched pages, requests."""
    request = tl.program_id(2)
    length = tl.load(lengths + request)
    page = tl.maximum(length - appended, 0) // PAGE + tl.program_id(1)
    if page * PAGE >= length:
        return
    at = tl.load(slots + request).to(tl.int64) * table_slot + page
    pool_page = tl.load(block_table + at).to(tl.int64)
    token = tl.arange(0, PAGE)
    channel = tl.program_id(0) * D + tl.arange(0, D)
    inside = (page * PAGE + token < length)[:, None]
    at_row = (pool_page * PAGE + token)[:, None] * pool_row + channel[None, :]
    low = tl.load(keys + at_row, mask=inside, other=float("inf"))
    high = tl.load(keys + at_row, mask=inside, other=float("-inf"))
    tl.store(lower + pool_page * pool_row + channel, tl.min(low, 0))
    tl.store(upper + pool_page * pool_row + channel, tl.max(high, 0))
