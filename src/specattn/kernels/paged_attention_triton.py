# mypy: disable-error-code="no-untyped-def"
"""The Triton side of :mod:`specattn.kernels.paged_attention`: what a program reads, and the inner loop.

Work is counted in *tiles* of ``BLOCK_N`` tokens. A *unit* is one list of tokens, that of a request and a KV head, met
by ``BLOCK_M`` query rows (the round's rows times the group; mostly all of them). Each program reads one stretch of one
unit, which :mod:`specattn.kernels.schedule` chose. A unit that is one stretch is finished there; of the others each
program leaves a partial result, normalised, with the logarithm of its sum, and the last of them to arrive combines all.

Lists are short, so that a program has a few tiles and waiting for memory is most of its time. So as little as possible
depends on what has been loaded before, and what says which tokens are read is loaded, if it may be, while the launch
before this one ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.early_launch_triton import let_next_start, wait_for_launch_before
from specattn.kernels.fetch_triton import fetch
from specattn.kernels.schedule_triton import FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What changes from round to round is not specialised, so that a kernel is compiled once for a model.
VARYING = [
    "rows",
    "table_slot",
    "count_batch",
    "count_head",
    "list_batch",
    "list_head",
    "weight_batch",
    "weight_head",
    "capacity",
]


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    query,  # [batch, rows, query_heads, HEAD_DIM]
    keys,  # [pool_rows, kv_heads, HEAD_DIM]
    values,
    block_table,  # int32 [slots, pages]
    slots,  # [batch]
    positions,  # [batch, rows]
    counts,  # [batch, kv_heads]
    indices,  # int32 [batch, kv_heads, capacity]; None: a list is 0, 1, 2, ...
    log_weights,  # [batch, kv_heads, capacity] or None
    out,  # [batch, rows, query_heads, HEAD_DIM], contiguous
    lse_out,  # float32 [batch, rows, query_heads], contiguous, or None
    stretches,  # int32 [programs, FIELDS]
    partials,  # float32 [programs, BLOCK_M, BLOCK_D]
    lses,  # float32 [programs, BLOCK_M]
    arrivals,  # int32 [units], 0 between launches
    scaling,
    rows,
    kv_heads,
    query_batch,  # strides, in elements
    query_row,
    query_head,
    pool_row,
    pool_head,
    table_slot,
    count_batch,
    count_head,
    list_batch,
    list_head,
    weight_batch,
    weight_head,
    capacity,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    SETTLED: tl.constexpr,  # only queries and these rows' keys and values are of the launch before
):
    if EARLY and not SETTLED:
        wait_for_launch_before()
    program = tl.program_id(0)
    stretch = stretches + program * FIELDS
    unit = tl.load(stretch)
    start = tl.load(stretch + 1)
    end = tl.load(stretch + 2)
    first = tl.load(stretch + 3)
    parts = tl.load(stretch + 4)
    batch = tl.load(stretch + 5)
    head = tl.load(stretch + 6)
    # Without a wait: the next launch begins behind that of the other programs.
    if unit < 0:
        return
    slot = tl.load(slots + batch)
    count = tl.load(counts + batch * count_batch + head * count_head)

    dims = tl.arange(0, BLOCK_D)
    m = unit % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // GROUP
    query_heads = head * GROUP + m % GROUP
    live = m < rows * GROUP
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    at = batch.to(tl.int64) * query_batch + row * query_row + query_heads * query_head
    asked = query + at[:, None] + dims[None, :]
    if not SETTLED:
        q = tl.load(asked, mask=mask, other=0.0)
    last_seen = tl.load(positions + batch * rows + row, mask=live, other=-1).to(tl.int32)

    keys += head * pool_head
    values += head * pool_head
    pages = block_table + slot * table_slot
    list_at = batch.to(tl.int64) * list_batch + head * list_head
    entry = start + tl.arange(0, BLOCK_N)
    # Where keys lie depends on their page, and the page on the token. Loads of the same iteration would wait for each
    # other, and Triton would make pipeline stages of them at the keys' expense, so they come from iterations before.
    # Tokens do not wait for a count, either: lists may be shorter than when they were scheduled, but not their room.
    end = tl.minimum(end, capacity)
    stop = tl.minimum(end, count)
    token = tl.where(entry < stop, _tokens(indices, list_at, entry, end), 0)
    following = tl.where(entry + BLOCK_N < stop, _tokens(indices, list_at, entry + BLOCK_N, end), 0)
    place = _place(pages, token, PAGE)
    if SETTLED:
        # One tile: of none a round takes .5 % longer on an H200, of two 2 %.
        _fetch(keys, values, place, entry < stop, pool_row, HEAD_DIM, BLOCK_D)
        wait_for_launch_before()
        q = tl.load(asked, mask=mask, other=0.0)

    part, lse = _attend(
        q,
        last_seen,
        token,
        following,
        place,
        keys,
        values,
        pages,
        indices,
        list_at,
        log_weights,
        batch.to(tl.int64) * weight_batch + head * weight_head,
        start,
        stop,
        scaling * LOG2_E,
        pool_row,
        PAGE,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    if EARLY:
        let_next_start()
    to = (batch.to(tl.int64) * rows + row) * kv_heads * GROUP + query_heads
    if parts == 1:
        _write(part, lse, out, lse_out, to, live, HEAD_DIM, BLOCK_D)
    else:
        own = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partials + own[:, None] * BLOCK_D + dims[None, :], part, mask=mask)
        tl.store(lses + own, lse)
        if _arrive(arrivals + unit, parts - 1):
            part, lse = _combine(
                partials, lses, first, first + parts - 1, live, HEAD_DIM, BLOCK_M, BLOCK_D, PARTS
            )
            _write(part, lse, out, lse_out, to, live, HEAD_DIM, BLOCK_D)


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    last_seen,  # [BLOCK_M]: the last position that a row sees
    token,  # [BLOCK_N]: of the first tile
    following,  # [BLOCK_N]: of the second
    place,  # [BLOCK_N]: rows of the pool, of the first
    keys,  # of one head
    values,
    pages,
    indices,
    list_at,
    log_weights,
    weights_at,
    start,
    stop,
    scaling,  # with log2(e), as exponentials are powers of two here
    pool_row,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Entries ``start`` to ``stop`` of a list: normalised output ``[BLOCK_M, BLOCK_D]`` and base-2 log of the sums.

    A row that sees nothing gives zeros and minus infinity.
    """
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for offset in range(start, stop, BLOCK_N):
        entry = offset + lanes
        valid = entry < stop
        at = place.to(tl.int64)[:, None] * pool_row + dims[None, :]
        live = valid[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + at, mask=live, other=0.0)
        v = tl.load(values + at, mask=live, other=0.0)
        next_place = _place(pages, following, PAGE)
        later = _tokens(indices, list_at, entry + 2 * BLOCK_N, stop)
        visible = valid[None, :] & (token[None, :] <= last_seen[:, None])
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if log_weights is not None:
            weight = tl.load(log_weights + weights_at + entry, mask=valid, other=0.0).to(tl.float32)
            logits += (weight * LOG2_E)[None, :]
        high, total, acc = _absorb(tl.where(visible, logits, float("-inf")), v, high, total, acc)
        # Not as it is: Triton pipelines no loop in which a value passes from one iteration to the next but one.
        token = tl.where(entry + BLOCK_N < stop, following, 0)
        following, place = later, next_place
    return acc / _positive(total)[:, None], high + tl.log2(_positive(total))


@triton.jit
def _tokens(indices, list_at, entry, stop):
    """The tokens of a list's entries, of those from ``stop`` on token 0."""
    if indices is None:
        token = tl.where(entry < stop, entry, 0)
    else:
        token = tl.load(indices + list_at + entry, mask=entry < stop, other=0)
    return token


@triton.jit
def _place(pages, token, PAGE: tl.constexpr):
    """Rows of the pool."""
    return tl.load(pages + token // PAGE) * PAGE + token % PAGE


@triton.jit
def _fetch(keys, values, place, valid, pool_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Have a tile's keys and values brought into L2, line by line.

    Those that the launch before is writing, too: this asks for no value.
    """
    LINE: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
    first = tl.arange(0, (BLOCK_D + LINE - 1) // LINE) * LINE
    at = place.to(tl.int64)[:, None] * pool_row + first[None, :]
    live = valid[:, None] & (first < HEAD_DIM)[None, :]
    fetch(keys + at, live)
    fetch(values + at, live)


@triton.jit
def _absorb(
    logits,  # [BLOCK_M, BLOCK_N], base 2
    v,  # [BLOCK_N, BLOCK_D]
    high,
    total,
    acc,
):
    """Add a tile to running softmaxes with maxima ``high``, sums ``total`` and weighted values ``acc``."""
    higher = tl.maximum(high, tl.max(logits, 1))
    base = _finite(higher)
    p = tl.exp2(logits - base[:, None])
    keep = tl.exp2(high - base)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return higher, total * keep + tl.sum(p, 1), acc


@triton.jit
def _write(part, lse, out, lse_out, to, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Finished rows, ``to`` which place of ``[batch, rows, query_heads]`` each belongs."""
    dims = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + to[:, None] * HEAD_DIM + dims[None, :], part.to(out.dtype.element_ty), mask=mask)
    if lse_out is not None:
        tl.store(lse_out + to, lse * LN_2, mask=live)


@triton.jit
def _arrive(arrivals, others):
    """Count a part as written; true in the last program to do so, after ``others``, which sees all parts."""
    # All threads have written before one of them counts; the atomic orders that before what the last one reads.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == others
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _combine(
    partials,
    lses,
    first,
    last,
    live,  # [BLOCK_M]
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The mean of the parts ``first`` to ``last`` of a unit, weighted by their sums, and base-2 log of all sums."""
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for base in tl.range(first, last + 1, PARTS, num_stages=1):
        for ahead in tl.static_range(PARTS):  # unrolled: their loads do not wait for each other
            there = base + ahead <= last
            at = (base + ahead) * BLOCK_M + m
            # Past the first-level cache, which other programs' stores do not reach.
            lse = tl.load(lses + at, mask=live & there, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(
                partials + at[:, None] * BLOCK_D + dims[None, :],
                mask=mask & there,
                other=0.0,
                cache_modifier=".cg",
            )
            higher = tl.maximum(high, lse)
            anchor = _finite(higher)
            weight = tl.exp2(lse - anchor)
            keep = tl.exp2(high - anchor)
            acc = acc * keep[:, None] + part * weight[:, None]
            total = total * keep + weight
            high = higher
    return acc / _positive(total)[:, None], high + tl.log2(_positive(total))


@triton.jit
def _finite(high):
    """What to subtract from logits of maximum ``high``: minus infinity less itself would be NaN."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def _positive(total):
    """A divisor: the sum of nothing, 0, divides an output of zeros."""
    return tl.where(total == 0.0, 1.0, total)
