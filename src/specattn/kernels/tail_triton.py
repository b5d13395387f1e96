# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Nucleus and sampled tail of a row in one program: the Triton side of :mod:`specattn.kernels.tail_lists`.

The nucleus is searched as in :mod:`specattn.kernels.nucleus_triton`, with the row in registers. What follows needs the
row in the order of its positions, because the draws depend on the sum of all probabilities before a token: it is read
again in tiles, from L2. One pass sums up what the nucleus leaves out, one each time that further tokens turn out to be
certain looks for more, and one writes the list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.draws_triton import clear_behind, comb_of, write_drawn
from specattn.kernels.nucleus_triton import find_nucleus, row_offset, survey
from specattn.kernels.threshold_triton import MASS, Row, read, value

VARYING = ["p", "a", "power", "inner", "sink", "recent"]


@triton.jit(do_not_specialize=VARYING)
def tail_kernel(
    scores,  # [batch, inner, width], the last dimension contiguous
    lengths,  # [batch]
    draws,  # [batch]
    shifts,  # int64 [batch, inner]
    indices,  # int32 [batch, inner, capacity]
    log_weights,  # float32 [batch, inner, capacity]
    counts,  # int32 [batch, inner]
    batch_stride,
    row_stride,
    inner,
    width,
    capacity,
    sink,
    recent,
    p,
    a,
    power,
    STEP: tl.constexpr,  # between the keys of neighbouring weights of the scores' type
    FORCED: tl.constexpr,  # a power of two from sink + recent on
    TILE: tl.constexpr,  # tokens that are read at a time once the nucleus is known
    B: tl.constexpr,
):
    program = tl.program_id(0)
    request = program // inner
    indices += program.to(tl.int64) * capacity
    log_weights += program.to(tl.int64) * capacity
    length = tl.minimum(tl.maximum(tl.load(lengths + request).to(tl.int32), 0), width)
    first = tl.minimum(sink, length)
    last = tl.maximum(length - recent, first)
    own = scores + row_offset(program, inner, batch_stride, row_stride)
    row = Row(own, first, last, tl.minimum((length + 15) // 16 * 16, width), width)
    forced = tl.arange(0, FORCED)
    forced = tl.where(forced < first, forced, forced - first + last)

    weight = read(row, 0, MASS, B.resident, B)
    mass, always, model = survey(row, weight, forced, length, B)
    low, cut = find_nucleus(row, weight, p, mass, always, model, STEP, B)
    bar, scale, slope, least = _probabilities(row, tl.load(draws + request).to(tl.float32), a, low, cut, TILE)

    comb = comb_of(tl.load(shifts + program))
    count = 0
    for start in range(0, length, TILE):
        tile, position, other = _others(row, start, low, cut, TILE)
        chance = slope * tile + least
        chance = tl.where(chance >= bar, 1.0, tl.minimum(chance * scale, 1.0))
        comb, count = write_drawn(indices, log_weights, position, length, other, chance, power, comb, count)
    tl.store(counts + program, count)
    clear_behind(indices, log_weights, count, capacity, TILE)


@triton.jit
def _others(row, start, low, cut, TILE: tl.constexpr):
    """Weights and positions of a tile, and which of its tokens may be drawn: those that are not in the nucleus."""
    position = start + tl.arange(0, TILE)
    weight = tl.load(row.scores + position, mask=position < row.limit, other=0.0).to(tl.float32)
    weight = tl.maximum(weight, 0.0)
    kept = (weight >= value(low)) & ((weight > value(low)) | (position >= cut))
    return weight, position, (position >= row.first) & (position < row.last) & ~kept


@triton.jit
def _probabilities(row, draws, a, low, cut, TILE: tl.constexpr):
    """How a weight becomes a probability.

    ``slope`` and ``least`` make the proposal of it. From ``bar`` on the token is certain; otherwise the proposal is
    multiplied by ``scale``.
    """
    number = tl.zeros([TILE], tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, row.last, TILE):
        weight, _, other = _others(row, start, low, cut, TILE)
        number += other.to(tl.float32)
        mass += tl.where(other, weight, 0.0)
    number = tl.sum(number)
    mass = tl.sum(mass)
    even = 1.0 / tl.maximum(number, 1.0)
    slope = tl.where(mass > 0, (1 - a) / mass, 0.0)
    least = tl.where(mass > 0, a * even, even)
    bar = 1.0 / tl.maximum(draws, 1.0)
    scale = tl.maximum(draws, 1.0)
    if draws >= number:
        bar = 0.0
    else:
        certain = 0.0
        found, left = _certain(row, low, cut, slope, least, bar, TILE)
        while found > certain:
            certain = found
            # Without a draw left for them the others keep the smallest probability that there is.
            scale = (draws - certain) / left
            if certain < draws:
                bar = tl.minimum(bar, left / (draws - certain))
                found, left = _certain(row, low, cut, slope, least, bar, TILE)
    return bar, scale, slope, least


@triton.jit
def _certain(row, low, cut, slope, least, bar, TILE: tl.constexpr):
    """How many tokens are certain, and what the others' proposal adds up to."""
    found = tl.zeros([TILE], tl.float32)
    left = tl.zeros([TILE], tl.float32)
    for start in range(0, row.last, TILE):
        weight, _, other = _others(row, start, low, cut, TILE)
        chance = slope * weight + least
        found += (other & (chance >= bar)).to(tl.float32)
        left += tl.where(other & (chance < bar), chance, 0.0)
    return tl.sum(found), tl.sum(left)
