# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Lists drawn at one rate, a row a program: the Triton side of :mod:`specattn.kernels.rate_lists`.

There is no threshold to search. A token's probability follows from its weight and the row's sum: one pass adds up, and
one, which finds the row in L2, draws and writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.draws_triton import clear_behind, comb_of, write_drawn
from specattn.kernels.nucleus_triton import row_offset

VARYING = ["rate", "a", "power", "inner", "sink", "recent"]


@triton.jit(do_not_specialize=VARYING)
def rate_kernel(
    scores,  # [batch, inner, width], the last dimension contiguous
    lengths,  # [batch]
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
    rate,
    a,
    power,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    indices += program.to(tl.int64) * capacity
    log_weights += program.to(tl.int64) * capacity
    length = tl.minimum(tl.maximum(tl.load(lengths + program // inner).to(tl.int32), 0), width)
    first = tl.minimum(sink, length)
    last = tl.maximum(length - recent, first)
    own = scores + row_offset(program, inner, batch_stride, row_stride)

    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        mass += _weights(own, start + tl.arange(0, TILE), length, width)
    mass = tl.sum(mass)
    # Without any mass the draws are uniform.
    slope = tl.where(mass > 0, rate * (1 - a) * length / mass, 0.0)
    least = tl.where(mass > 0, rate * a, rate)

    comb = comb_of(tl.load(shifts + program))
    count = 0
    for start in range(0, length, TILE):
        position = start + tl.arange(0, TILE)
        chance = tl.minimum(slope * _weights(own, position, length, width) + least, 1.0)
        other = (position >= first) & (position < last)
        comb, count = write_drawn(
            indices, log_weights, position, length, other, chance, power, comb, count
        )  # fmt: skip
    tl.store(counts + program, count)
    clear_behind(indices, log_weights, count, capacity, TILE)


@triton.jit
def _weights(row, position, length, width):
    """What counts of a tile's scores; masked in steps of 16, because one that ends anywhere would forbid wide loads."""
    limit = tl.minimum((length + 15) // 16 * 16, width)
    weight = tl.load(row + position, mask=position < limit, other=0.0).to(tl.float32)
    return tl.where((position < length) & (weight > 0) & (weight < float("inf")), weight, 0.0)
