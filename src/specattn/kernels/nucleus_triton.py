# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Top-p and top-k of a row in one program: the Triton side of :mod:`specattn.kernels.nucleus_lists`.

Why it is as it is. At best a row is read from memory once. So one program takes a row, and searches its threshold in
what it keeps of it: in registers, which hold 32K elements of a multiprocessor of an A100, H100 or H200, or in the L1
cache, from which the tiles that are not resident are read again. Two rows of 32K float32 scores are as large as that
cache; of 16-bit scores two fit with room to spare, and then while one program waits, the other works. Either way a
step of the search is bound by instructions and by the sum over the block, not by memory. That rules out what costs
more instructions an element:

- histograms (radix select): ``tl.histogram`` counts, but does not weigh, with ballots: about 57 instructions an
  element for 8 bits, and atomic additions are either to global memory or for integers only;
- a sort;
- splitting a row between programs: each step of the search would be a round trip through global memory.

The search (:mod:`specattn.kernels.threshold_triton`) makes few steps instead. Of the elements that have the
threshold's weight, the least recent that are not needed are counted off: in 16 bits there are some in every row. The
list (:mod:`specattn.kernels.listing_triton`) is written with one scan of words of 32 bits, not of elements, since a
scan of 32K elements would cost more than all the search. The range that is searched and the cut are masks of these
words, too: masks of the elements would make a copy of the row, for which there are no registers.

Where a program fills a multiprocessor, which would be idle while the next one's row comes from memory, each program
has the row of the one that will follow on its multiprocessor fetched into L2 while it searches.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from specattn.kernels.fetch_triton import fetch
from specattn.kernels.listing_triton import marks, ones_from, write_marked
from specattn.kernels.threshold_triton import (
    COUNT,
    INFINITE,
    LANES,
    MASS,
    ROUNDING,
    Row,
    as_weights,
    by_thread,
    fold,
    read,
    read_unmasked,
    search,
    value,
    within,
)

LOGISTIC = tl.constexpr(3**0.5 / math.pi * math.log(2) / 2.0**23)
"""What an octave of odds is worth in standard deviations of a logistic distribution, over the keys of an octave."""
LINE = tl.constexpr(32)
"""Elements between two addresses that are fetched: those of a line of 128 bytes, or of half of one."""

# What changes from call to call is not specialised.
VARYING = ["limit", "inner", "sink", "recent"]


@triton.jit(do_not_specialize=VARYING)
def select_kernel(
    scores,  # [batch, inner, width], the last dimension contiguous
    lengths,  # [batch]
    limit,  # p or k: a number, or [batch * inner]
    indices,  # int32 [batch, inner, capacity]
    counts,  # int32 [batch, inner]
    entries,  # [batch], places in the first dimension of scores, or None: one after the other
    also,  # int32 [batch, ALSO], positions that are kept whatever they weigh, negative: none; or None
    batch_stride,
    row_stride,
    inner,
    width,
    capacity,
    sink,
    recent,
    BY_MASS: tl.constexpr,  # top-p, otherwise top-k
    FILL: tl.constexpr,  # whether -1 follows a list
    PER_ROW: tl.constexpr,  # whether limit is a tensor
    STEP: tl.constexpr,  # between the keys of neighbouring weights of the scores' type
    FORCED: tl.constexpr,  # a power of two from sink + recent on
    ALSO: tl.constexpr,  # how many, 0 if there are none
    AHEAD: tl.constexpr,  # programs that run at a time, if their successors' rows are to be fetched; 0 if not
    B: tl.constexpr,
):
    program = tl.program_id(0)
    indices += program.to(tl.int64) * capacity
    if PER_ROW:
        limit = tl.load(limit + program)
    length = tl.minimum(tl.maximum(tl.load(lengths + program // inner).to(tl.int32), 0), width)
    first = tl.minimum(sink, length)
    last = tl.maximum(length - recent, first)
    own = scores + row_offset(program, inner, batch_stride, row_stride, entries)
    row = Row(own, first, last, tl.minimum((length + 15) // 16 * 16, width), width)
    forced = tl.arange(0, FORCED)
    forced = tl.where(forced < first, forced, forced - first + last)
    room = capacity - (length - last)  # for sink and selected positions

    weight = read(row, 0, MASS if BY_MASS else COUNT, B.resident, B)
    if BY_MASS:
        mass, always, model = survey(row, weight, forced, length, B)
    else:
        model = model_of_count(row, weight, B)
    if AHEAD > 0:
        follower = program + AHEAD
        if follower < tl.num_programs(0):
            _fetch(scores + row_offset(follower, inner, batch_stride, row_stride, entries), width, B)
    if BY_MASS:
        low, cut = find_nucleus(row, weight, limit, mass, always, model, STEP, B)
        if ALSO > 0:
            also += program // inner * ALSO
        end = _write(indices, row, weight, low, cut, room, MASS, B, also, ALSO)
        if end > room:
            # Read again rather than kept until here, in registers that are needed elsewhere.
            weight = read(row, 0, COUNT, B.resident, B)
            low, cut = _by_count(row, weight, room - first, model, STEP, B)
            end = _write(indices, row, weight, low, cut, room, COUNT, B)
    else:
        wanted = tl.minimum(tl.minimum(limit, length) - (length - last), room) - first
        low, cut = _by_count(row, weight, wanted, model, STEP, B)
        end = _write(indices, row, weight, low, cut, room, COUNT, B)

    slot = tl.where(forced < first, forced, forced - last + end)
    tl.store(indices + slot, forced, mask=forced < length)
    count = end + (length - last)
    tl.store(counts + program, count)
    if FILL:
        for start in range(count, capacity, 4 * LANES * B.warps):
            unused = start + tl.arange(0, 4 * LANES * B.warps)
            tl.store(indices + unused, -1, mask=unused < capacity)


@triton.jit
def row_offset(program, inner, batch_stride, row_stride, entries=None):
    entry = program // inner
    if entries is not None:
        entry = tl.load(entries + entry)
    return entry.to(tl.int64) * batch_stride + (program % inner).to(tl.int64) * row_stride


@triton.jit
def _fetch(scores, width, B: tl.constexpr):
    """Have the beginning of another row fetched into L2."""
    offset = tl.minimum(tl.arange(0, B.resident // LINE) * LINE, width - 1)
    fetch(scores + offset)


@triton.jit
def survey(row, weight, forced, length, B: tl.constexpr):
    """Mass of the range that is searched, and of the positions that are forced; the model of the former."""
    parts = fold(weight, B.resident, B)
    whole, first, second = _moments(weight, MASS, B)
    for start in range(B.resident, row.last, B.tile):
        tile = read(row, start, MASS, B.tile, B)
        parts += fold(tile, B.tile, B)
        a, b, c = _moments(tile, MASS, B)
        whole, first, second = whole + a, first + b, second + c
    always = tl.load(row.scores + forced, mask=forced < length, other=0.0).to(tl.float32)
    always = tl.sum(tl.maximum(always, 0.0, propagate_nan=tl.PropagateNan.ALL))
    mass, whole, first, second = tl.reduce((by_thread(parts, B), whole, first, second), 0, _add_four)
    return mass, always, _model(whole, first, second)


@triton.jit
def model_of_count(row, weight, B: tl.constexpr):
    """The model of the positive weights' number."""
    whole, first, second = _moments(weight, COUNT, B)
    for start in range(B.resident, row.last, B.tile):
        a, b, c = _moments(read(row, start, COUNT, B.tile, B), COUNT, B)
        whole, first, second = whole + a, first + b, second + c
    whole, first, second, _ = tl.reduce((whole, first, second, whole), 0, _add_four)
    return _model(whole, first, second)


@triton.jit
def _moments(weight, KIND: tl.constexpr, B: tl.constexpr):
    """Each thread's sums of the mass, or of the positive weights' number, times powers of the keys.

    Of a vector's first element: that is enough for a first guess.
    """
    even, _ = tl.split(tl.reshape(weight, [weight.shape[0] // 2, 2]))
    sample, _ = tl.split(tl.reshape(even, [even.shape[0] // 2, 2]))
    if B.vector == 8:
        sample, _ = tl.split(tl.reshape(sample, [sample.shape[0] // 2, 2]))
    key = sample.to(tl.int32, bitcast=True).to(tl.float32)
    amount = sample if KIND == MASS else (sample > 0).to(tl.float32)
    return _of_samples(amount, B), _of_samples(amount * key, B), _of_samples(amount * key * key, B)


@triton.jit
def _of_samples(amounts, B: tl.constexpr):
    """Sums ``[32 * warps]`` of amounts of vectors: each thread's own."""
    threads: tl.constexpr = LANES * B.warps
    return tl.sum(tl.reshape(amounts, [amounts.shape[0] // threads, threads]), 0)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _model(whole, first, second):
    """Which key the middle of the scale of ``gauge`` is taken for, and how many keys for its unit."""
    whole = tl.maximum(whole, 1e-30)
    center = first / whole
    return center, LOGISTIC * tl.sqrt(tl.maximum(second / whole - center * center, 0.0))


@triton.jit
def find_nucleus(row, weight, p, mass, always, model, STEP: tl.constexpr, B: tl.constexpr):
    """Threshold and cut of what holds ``p`` of the mass together with what is forced."""
    total = mass + always
    low = 0
    cut = 0
    if (p < 1) & (total > 0) & (total < float("inf")):
        low, cut = _by_mass(row, weight, tl.minimum(p * total - always, mass), mass, model, STEP, B)
    return low, cut


@triton.jit
def _by_mass(row, weight, needed, mass, model, STEP: tl.constexpr, B: tl.constexpr):
    """Threshold and cut of the heaviest weights that hold ``needed`` of the row's ``mass``."""
    low = INFINITE + STEP
    drop = 0
    if needed > 0:
        # All that is lighter than this is half of the mass that may be left out, or less.
        light = 0.5 * (mass - needed) / (row.last - row.first)
        low = tl.maximum(light.to(tl.int32, bitcast=True) & -STEP, STEP)
        high = (mass.to(tl.int32, bitcast=True) & -STEP) + STEP
        low, found, tied = search(row, weight, needed, mass, low, high, model, MASS, STEP, B)
        if tied:
            # Larger by the rounding, which must not keep a tie that is not needed.
            surplus = (found - needed) / value(low) * (1 + ROUNDING)
            drop = tl.minimum(surplus, row.width.to(tl.float32)).to(tl.int32)
    return low, _cut(row, weight, low, drop, MASS, B)


@triton.jit
def _by_count(row, weight, wanted, model, STEP: tl.constexpr, B: tl.constexpr):
    """Threshold and cut of the ``wanted`` heaviest weights."""
    low = 0
    high = INFINITE + STEP
    drop = 0
    if wanted <= 0:
        low = INFINITE + STEP
    elif wanted < row.last - row.first:
        needed = wanted.to(tl.float32)
        total = (row.last - row.first).to(tl.float32)
        low, found, _ = search(row, weight, needed, total, low, high, model, COUNT, STEP, B)
        drop = (found - needed).to(tl.int32)
    return low, _cut(row, weight, low, drop, COUNT, B)


@triton.jit
def _cut(row, weight, low, drop, KIND: tl.constexpr, B: tl.constexpr):
    """The position before which elements with the key ``low`` are not kept: ``drop`` of them, the least recent.

    Counted in the stretches of the warps first; of the stretch in which the cut lies the elements are read again.
    """
    cut = 0
    if drop > 0:
        cut, drop = _skip(row, weight, low, 0, drop, KIND, B.resident, B)
        for start in range(B.resident, row.last, B.tile):
            if cut == start:
                tile = read(row, start, COUNT, B.tile, B)
                cut, drop = _skip(row, tile, low, start, drop, KIND, B.tile, B)
        longest: tl.constexpr = (B.resident if B.resident > B.tile else B.tile) // B.warps
        position = cut + tl.arange(0, longest)
        read_again = tl.load(row.scores + position, mask=position < row.last, other=0.0).to(tl.float32)
        read_again = tl.maximum(tl.where(read_again < float("inf"), read_again, float("inf")), 0.0)
        tied = (read_again == value(low)) & (position >= row.first) & (position < row.last)
        cut += tl.sum((tl.cumsum(tied.to(tl.int32), 0) <= drop).to(tl.int32))
    return cut


@triton.jit
def _skip(row, weight, low, start, drop, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """Where the first stretch of a tile begins that has more ties than are left to drop, and how many these are."""
    tied = weight == value(low)
    if KIND == COUNT:  # whose threshold may be 0, the weight of what is outside of the range
        tied &= within(start, row.first, row.last, SIZE, B)
    ties = tl.sum(tl.reshape(fold(tied.to(tl.float32), SIZE, B), [B.warps, LANES * B.vector]), 1).to(tl.int32)
    skipped = tl.cumsum(ties, 0) <= drop
    start += tl.sum(skipped.to(tl.int32)) * (SIZE // B.warps)
    return start, drop - tl.sum(tl.where(skipped, ties, 0))


@triton.jit
def _write(
    out, row, weight, low, cut, room, KIND: tl.constexpr, B: tl.constexpr, also=None, ALSO: tl.constexpr = 0
):  # fmt: skip
    """Write a row's kept positions behind its sink; where they end, even if that is beyond ``room``."""
    kept = _words(row, weight, 0, low, cut, KIND, B.resident, B)
    if ALSO > 0:
        kept |= _words_of(also, row, 0, ALSO, B.resident)
    end = write_marked(out, kept, 0, row.first, room, B.resident)
    for start in range(B.resident, row.last, B.tile):
        tile = read_unmasked(row, start, B.tile, B)
        if KIND == COUNT:
            tile = as_weights(tile, COUNT)
        words = _words(row, tile, start, low, cut, KIND, B.tile, B)
        if ALSO > 0:
            words |= _words_of(also, row, start, ALSO, B.tile)
        end = write_marked(out, words, start, end, room, B.tile)
    return end


@triton.jit
def _words(row, weight, start, low, cut, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """What is kept of a tile, as ``marks``; by mass, the tile may be of scores instead of weights."""
    # In a tile before the cut, all ties are left out.
    threshold = tl.where(cut < start + SIZE, value(low), value(low + 1))
    words = marks(weight, threshold, SIZE, B)
    if (start < cut) & (cut < start + SIZE):
        words = (words & ones_from(cut - start, SIZE)) | marks(weight, value(low + 1), SIZE, B)
    if KIND == MASS:  # 0 keeps everything: negative scores, too, and NaN
        words = tl.where(low > 0, words, -1)
    return words & _searched(row, start, SIZE)


@triton.jit
def _words_of(places, row, start, NUMBER: tl.constexpr, SIZE: tl.constexpr):
    """The same words with the bits of single ``places``, as far as they are in the range that is searched."""
    word = tl.arange(0, SIZE // 32)
    words = tl.zeros([SIZE // 32], tl.int32)
    for number in tl.static_range(NUMBER):  # unrolled: their loads do not wait for each other
        place = tl.load(places + number) - start
        words |= tl.where(word == place >> 5, 1 << (place & 31), 0)
    return words & _searched(row, start, SIZE)


@triton.jit
def _searched(row, start, SIZE: tl.constexpr):
    return ones_from(row.first - start, SIZE) & ~ones_from(row.last - start, SIZE)
