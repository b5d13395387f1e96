# mypy: disable-error-code="no-untyped-def"
"""The Triton side of :mod:`specattn.kernels.paged_attention`: which program reads what, and the inner loop.

Work is counted in *tiles* of ``BLOCK_N`` tokens. A *unit* is one list of tokens, that of a request and a KV head, met
by ``BLOCK_M`` query rows (the round's rows times the group; mostly all of them). All tiles of all units are laid end to
end and cut into as many equal stretches as there are programs (stream-K; Osama et al. 2023), so that lists of any
length keep the whole GPU busy to the end. The cut follows from the counts on the device. A unit that lies in one
stretch is finished there; of the others each program leaves a partial result, normalised, with the logarithm of its
sum, and a second kernel combines them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What changes from round to round is not specialised, so that a kernel is compiled once for a model.
VARYING = [
    "units",
    "rows",
    "table_slot",
    "count_batch",
    "count_head",
    "list_batch",
    "list_head",
    "weight_batch",
    "weight_head",
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
    partials,  # float32 [programs + units, BLOCK_M, BLOCK_D]
    lses,  # float32 [programs + units, BLOCK_M]
    plan,  # int32 [units, 2]: the first and the last program of each unit
    scaling,
    units,
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
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNITS: tl.constexpr,
):
    blocks = tl.cdiv(rows * GROUP, BLOCK_M)
    total = _total_tiles(counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N, UNITS)
    programs = tl.minimum(tl.num_programs(0), total)
    program = tl.program_id(0)
    if program >= programs:
        return
    tile = _first_tile(program, programs, total)
    stop = _first_tile(program + 1, programs, total)
    unit, start = _find_unit(tile, counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N, UNITS)
    dims = tl.arange(0, BLOCK_D)
    while tile < stop:
        batch = unit // blocks // kv_heads
        head = unit // blocks % kv_heads
        count = tl.load(counts + batch * count_batch + head * count_head)
        end = start + tl.maximum(tl.cdiv(count, BLOCK_N), 1)

        m = unit % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        row = m // GROUP
        query_heads = head * GROUP + m % GROUP
        live = (m < rows * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        at = batch.to(tl.int64) * query_batch + row * query_row + query_heads * query_head
        q = tl.load(query + at[:, None] + dims[None, :], mask=live, other=0.0)
        last_seen = tl.load(positions + batch * rows + row, mask=m < rows * GROUP, other=-1).to(tl.int32)

        part, lse = _attend(
            q,
            last_seen,
            keys + head * pool_head,
            values + head * pool_head,
            block_table + tl.load(slots + batch) * table_slot,
            indices,
            batch.to(tl.int64) * list_batch + head * list_head,
            log_weights,
            batch.to(tl.int64) * weight_batch + head * weight_head,
            (tile - start) * BLOCK_N,
            tl.minimum((stop - start) * BLOCK_N, count),
            scaling * LOG2_E,
            pool_row,
            PAGE,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        if tile == start:
            tl.store(plan + 2 * unit, program)
            tl.store(plan + 2 * unit + 1, _program_of(end - 1, programs, total))
        if (tile == start) & (end <= stop):
            to = (batch.to(tl.int64) * rows + row) * kv_heads * GROUP + query_heads
            tl.store(out + to[:, None] * HEAD_DIM + dims[None, :], part.to(out.dtype.element_ty), mask=live)
            if lse_out is not None:
                tl.store(lse_out + to, lse * LN_2, mask=m < rows * GROUP)
        else:
            # Along the stretches program + unit grows with each part: no two parts share a place.
            to = (program + unit).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partials + to[:, None] * BLOCK_D + dims[None, :], part, mask=live)
            tl.store(lses + to, lse)
        tile = tl.minimum(end, stop)
        start = end
        unit += 1


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partials,
    lses,
    plan,
    out,
    lse_out,
    rows,
    kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One query row and head of a unit: the mean of its parts, weighted by their sums."""
    unit = tl.program_id(0)
    first = tl.load(plan + 2 * unit)
    last = tl.load(plan + 2 * unit + 1)
    if first == last:
        return
    blocks = tl.cdiv(rows * GROUP, BLOCK_M)
    m = unit % blocks * BLOCK_M + tl.program_id(1)
    if m >= rows * GROUP:
        return
    dims = tl.arange(0, BLOCK_D)
    high = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for program in range(first, last + 1, PARTS):
        part = program + tl.arange(0, PARTS)
        at = (part + unit).to(tl.int64) * BLOCK_M + tl.program_id(1)
        lse = tl.load(lses + at, mask=part <= last, other=float("-inf"))
        live = (part <= last)[:, None] & (dims < HEAD_DIM)[None, :]
        value = tl.load(partials + at[:, None] * BLOCK_D + dims[None, :], mask=live, other=0.0)
        higher = tl.maximum(high, tl.max(lse, 0))
        base = _finite(higher)
        weight = tl.exp2(lse - base)
        keep = tl.exp2(high - base)
        acc = acc * keep + tl.sum(weight[:, None] * value, 0)
        total = total * keep + tl.sum(weight, 0)
        high = higher
    batch = unit // blocks // kv_heads
    query_head = unit // blocks % kv_heads * GROUP + m % GROUP
    to = (batch.to(tl.int64) * rows + m // GROUP) * kv_heads * GROUP + query_head
    result = acc / _positive(total)
    tl.store(out + to * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    if lse_out is not None:
        tl.store(lse_out + to, (high + tl.log2(_positive(total))) * LN_2)


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    last_seen,  # [BLOCK_M]: the last position that a row sees
    keys,
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
    # The place of a key depends on its page, and the page on the token. Within one iteration Triton would make a
    # pipeline stage of each of these loads, at the keys' expense, so they come from the iteration before. They must be
    # what a load returned: a value that is merely handed on from one iteration to the next turns pipelining off.
    token = _tokens(indices, list_at, start + lanes, stop)
    page = tl.load(pages + token // PAGE)
    next_token = _tokens(indices, list_at, start + BLOCK_N + lanes, stop)
    for offset in range(start, stop, BLOCK_N):
        valid = offset + lanes < stop
        at = (page.to(tl.int64) * PAGE + token % PAGE)[:, None] * pool_row + dims[None, :]
        live = valid[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + at, mask=live, other=0.0)
        v = tl.load(values + at, mask=live, other=0.0)
        page = tl.load(pages + next_token // PAGE)
        next_token = _tokens(indices, list_at, offset + 2 * BLOCK_N + lanes, stop)

        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if log_weights is not None:
            weight = tl.load(log_weights + weights_at + offset + lanes, mask=valid, other=0.0).to(tl.float32)
            logits += (weight * LOG2_E)[None, :]
        visible = valid[None, :] & (token[None, :] <= last_seen[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(high, tl.max(logits, 1))
        base = _finite(higher)
        p = tl.exp2(logits - base[:, None])
        keep = tl.exp2(high - base)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        high = higher
        token = _tokens(indices, list_at, offset + BLOCK_N + lanes, stop)
    return acc / _positive(total)[:, None], high + tl.log2(_positive(total))


@triton.jit
def _tokens(indices, list_at, entry, stop):
    """Token positions of a list's entries; 0, which is always in the block table, from ``stop`` on."""
    if indices is None:
        return tl.where(entry < stop, entry, 0)
    else:
        return tl.load(indices + list_at + entry, mask=entry < stop, other=0)


@triton.jit
def _finite(high):
    """What to subtract from logits of maximum ``high``: minus infinity less itself would be NaN."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def _positive(total):
    """A divisor: the sum of nothing, 0, divides an output of zeros."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def _first_tile(program, programs, total):
    return (program.to(tl.int64) * total // programs).to(tl.int32)


@triton.jit
def _program_of(tile, programs, total):
    """The last program whose first tile is not behind ``tile``."""
    return (((tile + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


@triton.jit
def _tiles(unit, counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N: tl.constexpr):
    """Tiles of each of ``unit``, 0 behind the last. An empty list has one: somebody must write its zeros."""
    batch = unit // blocks // kv_heads
    head = unit // blocks % kv_heads
    count = tl.load(counts + batch * count_batch + head * count_head, mask=unit < units, other=0)
    return tl.where(unit < units, tl.maximum(tl.cdiv(count, BLOCK_N), 1), 0)


@triton.jit
def _total_tiles(
    counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N: tl.constexpr, UNITS: tl.constexpr
):
    total = 0
    for base in range(0, units, UNITS):
        unit = base + tl.arange(0, UNITS)
        total += tl.sum(_tiles(unit, counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N))
    return total


@triton.jit
def _find_unit(
    tile, counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N: tl.constexpr, UNITS: tl.constexpr
):
    """The unit that ``tile`` belongs to, and the unit's first tile."""
    found = 0
    start = 0
    seen = 0
    for base in range(0, units, UNITS):
        unit = base + tl.arange(0, UNITS)
        tiles = _tiles(unit, counts, units, blocks, kv_heads, count_batch, count_head, BLOCK_N)
        before = seen + tl.cumsum(tiles) <= tile
        found += tl.sum(before.to(tl.int32))
        start += tl.sum(tl.where(before, tiles, 0))
        seen += tl.sum(tiles)
    return found, start
