# mypy: disable-error-code="no-untyped-def"
"""The Triton side of :mod:`specattn.kernels.paged_attention`: which program reads what, and the inner loop.

Work is counted in *tiles* of ``BLOCK_N`` tokens. A *unit* is one list of tokens, that of a request and a KV head, met
by ``BLOCK_M`` query rows (the round's rows times the group; mostly all of them). All tiles of all units are laid end to
end and cut into as many equal stretches as there are programs (stream-K; Osama et al. 2023), so that lists of any
length keep the whole GPU busy to the end. The cut follows from the counts on the device. A unit that lies in one
stretch is finished there; of the others each program leaves a partial result, normalised, with the logarithm of its
sum, and the last of them to arrive combines all.
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
    arrivals,  # int32 [units], 0 between launches
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
    LOOKUP: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
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
        slot = tl.load(slots + batch)
        end = start + tl.maximum(tl.cdiv(count, BLOCK_N), 1)

        m = unit % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        row = m // GROUP
        query_heads = head * GROUP + m % GROUP
        live = m < rows * GROUP
        mask = live[:, None] & (dims < HEAD_DIM)[None, :]
        at = batch.to(tl.int64) * query_batch + row * query_row + query_heads * query_head
        q = tl.load(query + at[:, None] + dims[None, :], mask=mask, other=0.0)
        last_seen = tl.load(positions + batch * rows + row, mask=live, other=-1).to(tl.int32)

        part, lse = _attend(
            q,
            last_seen,
            keys + head * pool_head,
            values + head * pool_head,
            block_table + slot * table_slot,
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
            LOOKUP,
        )
        to = (batch.to(tl.int64) * rows + row) * kv_heads * GROUP + query_heads
        if (tile == start) & (end <= stop):
            _write(part, lse, out, lse_out, to, live, HEAD_DIM, BLOCK_D)
        else:
            # Along the stretches program + unit grows with each part: no two parts share a place.
            place = (program + unit).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partials + place[:, None] * BLOCK_D + dims[None, :], part, mask=mask)
            tl.store(lses + place, lse)
            first = _program_of(start, programs, total)
            last = _program_of(end - 1, programs, total)
            if _arrive(arrivals + unit, last - first):
                part, lse = _combine(
                    partials, lses, first + unit, last + unit, live, HEAD_DIM, BLOCK_M, BLOCK_D, PARTS
                )
                _write(part, lse, out, lse_out, to, live, HEAD_DIM, BLOCK_D)
        tile = tl.minimum(end, stop)
        start = end
        unit += 1


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
    LOOKUP: tl.constexpr,
):
    """Entries ``start`` to ``stop`` of a list: normalised output ``[BLOCK_M, BLOCK_D]`` and base-2 log of the sums.

    A row that sees nothing gives zeros and minus infinity.
    """
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if indices is None:
        # Within one iteration Triton would make a pipeline stage of the page's load, at the keys' expense, so it comes
        # from the iteration before.
        page = tl.load(pages + tl.where(start + lanes < stop, start + lanes, 0) // PAGE)
        for offset in range(start, stop, BLOCK_N):
            token = offset + lanes
            valid = token < stop
            at = (page.to(tl.int64) * PAGE + token % PAGE)[:, None] * pool_row + dims[None, :]
            live = valid[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(keys + at, mask=live, other=0.0)
            v = tl.load(values + at, mask=live, other=0.0)
            page = tl.load(pages + tl.where(token + BLOCK_N < stop, token + BLOCK_N, 0) // PAGE)
            visible = valid[None, :] & (token[None, :] <= last_seen[:, None])
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            high, total, acc = _absorb(tl.where(visible, logits, float("-inf")), v, high, total, acc)
    else:
        # The place of a key depends on its page, and the page on the token: where ``LOOKUP`` entries lie is found at
        # once, and the loop over their tiles has no other loads before those of keys and values.
        steps = tl.arange(0, LOOKUP // BLOCK_N)[:, None]
        entries = steps * BLOCK_N + lanes[None, :]
        tokens, places = _look_up(indices + list_at, pages, start + entries, stop, PAGE)
        for base in range(start, stop, LOOKUP):
            next_tokens, next_places = _look_up(indices + list_at, pages, base + LOOKUP + entries, stop, PAGE)
            for step in range(tl.cdiv(tl.minimum(stop - base, LOOKUP), BLOCK_N)):
                entry = base + step * BLOCK_N + lanes
                valid = entry < stop
                place = tl.sum(tl.where(steps == step, places, 0), 0)
                at = place.to(tl.int64)[:, None] * pool_row + dims[None, :]
                live = valid[:, None] & (dims < HEAD_DIM)[None, :]
                k = tl.load(keys + at, mask=live, other=0.0)
                v = tl.load(values + at, mask=live, other=0.0)
                token = tl.sum(tl.where(steps == step, tokens, 0), 0)
                visible = valid[None, :] & (token[None, :] <= last_seen[:, None])
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
                if log_weights is not None:
                    weight = tl.load(log_weights + weights_at + entry, mask=valid, other=0.0).to(tl.float32)
                    logits += (weight * LOG2_E)[None, :]
                high, total, acc = _absorb(tl.where(visible, logits, float("-inf")), v, high, total, acc)
            tokens, places = next_tokens, next_places
    return acc / _positive(total)[:, None], high + tl.log2(_positive(total))


@triton.jit
def _look_up(list_, pages, entry, stop, PAGE: tl.constexpr):
    """Tokens of a list's entries, and their rows in the pool; 0 from ``stop`` on."""
    live = entry < stop
    token = tl.load(list_ + entry, mask=live, other=0)
    page = tl.load(pages + token // PAGE, mask=live, other=0)
    return token, page * PAGE + token % PAGE


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


@triton.jit
def _first_tile(program, programs, total):
    """Stretches are as long as each other, but that the first ones have one tile more until nothing remains."""
    return program * (total // programs) + tl.minimum(program, total % programs)


@triton.jit
def _program_of(tile, programs, total):
    """The program in whose stretch ``tile`` lies."""
    tiles = total // programs
    longer = total % programs
    in_longer = longer * (tiles + 1)
    return tl.where(tile < in_longer, tile // (tiles + 1), longer + (tile - in_longer) // tiles)


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
