# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.page_scores`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pages", "entry_batch"])
def page_scores_kernel(
    query,  # [batch, ROWS, query_heads, D]
    lower,  # [stored pages, kv_heads, D]
    upper,
    entries,  # [batch, pages]
    filled,  # [batch]
    out,  # float32 [batch, kv_heads, ROWS * GROUP, pages]
    scaling,
    pages,
    query_batch,  # strides, in elements
    query_row,
    query_head,
    bound_page,
    bound_head,
    entry_batch,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of pages, KV heads, requests."""
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    live = m < ROWS * GROUP
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = page < tl.load(filled + request)
    dims = tl.arange(0, BLOCK_D)

    at = request * query_batch + m // GROUP * query_row + (head * GROUP + m % GROUP) * query_head
    q = tl.load(query + at[:, None] + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0)
    entry = tl.load(entries + request * entry_batch + page, mask=scored, other=0).to(tl.int64)
    at = entry[:, None] * bound_page + head * bound_head + dims[None, :]
    wanted = scored[:, None] & (dims < D)[None, :]
    high = tl.load(upper + at, mask=wanted, other=0.0)
    low = tl.load(lower + at, mask=wanted, other=0.0)
    scores = tl.dot(tl.where(q > 0, q, 0.0).to(q.dtype), tl.trans(high), input_precision="ieee")
    scores = tl.dot(tl.where(q > 0, 0.0, q).to(q.dtype), tl.trans(low), scores, input_precision="ieee")
    scores = tl.where(scored[None, :], scores * scaling, float("-inf"))
    to = ((request * tl.num_programs(1) + head) * ROWS * GROUP + m).to(tl.int64)[:, None] * pages
    tl.store(out + to + page[None, :], scores, mask=live[:, None] & (page < pages)[None, :])
