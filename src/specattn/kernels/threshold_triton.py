# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that find the weight from which on a row's elements are kept.

Weights that are not negative sort like their bits read as integers, here called keys. ``search`` narrows a bracket of
two keys: from ``low`` on there is enough, from ``high`` on there is not. A step costs one pass over the row and one sum
over the block. Of each element it takes what reaches either of two keys: a comparison that gives 0.0 or 1.0 and a fused
multiply-add for each.

Bisection would take a step for each of the key's 31 bits. Here the first two keys come from a model, a logistic
distribution of the mass over the keys (roughly the weights' logarithms). The others lie around the interpolated
logarithm of the odds of the mass found, in which such a distribution is a straight line: between them is the threshold,
if the interpolation was good, and a twelfth of the bracket is left. Where it fails, steps divide the bracket by three.
Rows of attention mostly take three to six steps; no row takes many more than division by three would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LANES = tl.constexpr(32)
INFINITE = tl.constexpr(0x7F800000)
"""The key of infinity, the highest of a weight. What is above is NaN's, which no weight reaches."""
ROUNDING = tl.constexpr(2.0**-20)
"""Surplus mass, as a part of the total, that is within the rounding of its sum."""
LEAN = tl.constexpr(0.02)
"""The least distance of an interpolated key from either end, as a part of the bracket."""
MARGIN = tl.constexpr(0.08)
"""How far from the interpolated key the two lie that are tried, as a part of the bracket."""
FIRST_MARGIN = tl.constexpr(0.5 * 2.0**23)
"""The same for the first step, on the scale of ``gauge``."""
PATIENCE = tl.constexpr(3)
"""How many more steps may have left over a third of the bracket than have not, before one divides it evenly."""

MASS, COUNT = tl.constexpr(0), tl.constexpr(1)
"""What a search adds up: mass, or elements."""


class Blocks(NamedTuple):
    """How a program holds its row.

    Attributes:
        resident: elements that stay in registers: a power of two, at least a row of a warp for each warp.
        tile: elements that are read at a time of those beyond; likewise.
        warps: of a program.
        registers: that a thread may have.
        vector: consecutive elements that a lane reads at once, and a warp's row has 32 times as many.
    """

    resident: int
    tile: int
    warps: int
    registers: int
    vector: int = 4


class Row(NamedTuple):
    """What is known of a program's row, in the kernel.

    Attributes:
        scores: pointer to its first element.
        first, last: the range of positions that is searched, ``last`` not included.
        limit: where what may be read ends.
        width: elements of the row, also of those that are not visible.
    """

    scores: Any
    first: Any
    last: Any
    limit: Any
    width: Any


@triton.jit
def value(key):
    """The weight of a key."""
    return key.to(tl.float32, bitcast=True)


@triton.jit
def positions(start, SIZE: tl.constexpr, B: tl.constexpr):
    """The positions of a tile ``[SIZE]`` that begins at ``start``.

    Triton deals out rows of 32 vectors to the warps in turn. Here the rows of a warp follow each other, so that it
    holds one stretch of consecutive positions.
    """
    row: tl.constexpr = LANES * B.vector
    i = tl.arange(0, SIZE)
    return start + i // row % B.warps * (SIZE // B.warps) + i // (row * B.warps) * row + i % row


@triton.jit
def position_parts(start, SIZE: tl.constexpr, B: tl.constexpr):
    """The same positions as a sum of ``[rows, 1]``, which the compiler knows, and ``[1, row * warps]``."""
    row: tl.constexpr = LANES * B.vector
    i = tl.arange(0, row * B.warps)
    first = tl.arange(0, SIZE // (row * B.warps)) * row
    return first[:, None], (start + i // row * (SIZE // B.warps) + i % row)[None, :]


@triton.jit
def within(start, first, last, SIZE: tl.constexpr, B: tl.constexpr):
    """Whether each position of a tile lies in ``[first, last)``; one before the first is, unsigned, beyond the last."""
    row, column = position_parts(start - first, SIZE, B)
    return tl.reshape((row + column).to(tl.uint32) < (last - first).to(tl.uint32), [SIZE])


@triton.jit
def read(row, start, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """The weights of a tile: 0 for negative scores and outside of ``[first, last)``.

    NaN is kept where mass is added up, so that it shows in the sum; elsewhere it counts as infinity.
    """
    if (start >= row.first) & (start + SIZE <= row.last):
        weight = _weights(row, start, KIND, SIZE, B)
    else:
        weight = _weights(row, start, KIND, SIZE, B)
        weight = tl.where(within(start, row.first, row.last, SIZE, B), weight, 0.0)
    return weight


@triton.jit
def _weights(row, start, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    vector: tl.constexpr = B.vector
    position = positions(start, SIZE, B)
    source = tl.max_contiguous(row.scores + position, vector)
    weight = tl.load(source, mask=position < row.limit).to(tl.float32)
    weight = tl.maximum(weight, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND != MASS:
        weight = tl.where(weight < float("inf"), weight, float("inf"))
    return weight


@triton.jit
def fold(amounts, SIZE: tl.constexpr, B: tl.constexpr):
    """Sums ``[row * warps]`` of ``[SIZE]`` amounts: each thread adds its own."""
    row: tl.constexpr = LANES * B.vector
    return tl.sum(tl.reshape(amounts, [SIZE // (row * B.warps), row * B.warps]), 0)


@triton.jit
def by_thread(parts, B: tl.constexpr):
    """Sums ``[32 * warps]`` of folded ones: each thread's own."""
    return tl.sum(tl.reshape(parts, [LANES * B.warps, B.vector]), 1)


@triton.jit
def reaching(weight, key, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """Mass or number of a tile's weights whose key is at least ``key``, folded."""
    inside = (weight >= value(key)).to(tl.float32)
    return fold(inside * weight if KIND == MASS else inside, SIZE, B)


@triton.jit
def measure(row, weight, lower, upper, KIND: tl.constexpr, B: tl.constexpr):
    """Mass or number of a row's weights whose key is at least ``lower``, and at least ``upper``."""
    some = reaching(weight, lower, KIND, B.resident, B)
    fewer = reaching(weight, upper, KIND, B.resident, B)
    for start in range(B.resident, row.last, B.tile):
        tile = read(row, start, KIND, B.tile, B)
        some += reaching(tile, lower, KIND, B.tile, B)
        fewer += reaching(tile, upper, KIND, B.tile, B)
    return tl.reduce((by_thread(some, B), by_thread(fewer, B)), 0, _add_two)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def gauge(part, total):
    """A part of the total on the scale on which keys are interpolated: roughly the logarithm of its odds.

    A logarithm as the keys are one, so that 2**23 stand for odds of two to one; bounded, so that neither nothing nor
    all is infinite.
    """
    least = total * ROUNDING
    inside = (part + least).to(tl.int32, bitcast=True)
    outside = (total - part + least).to(tl.int32, bitcast=True)
    return (inside - outside).to(tl.float32)


@triton.jit
def search(
    row,
    weight,
    needed,
    total,
    low,
    high,
    model,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    B: tl.constexpr,
):
    """The highest key, a multiple of ``STEP``, from which on a row has ``needed`` of its ``total``.

    Args:
        weight: the row's resident tile.
        low, high: a bracket: ``needed`` is reached from ``low`` on, and not from ``high`` on.
        model: which key the middle of the scale of ``gauge`` is taken for, and how many keys for its unit.

    Returns:
        the key; the mass, or number, from there on; and whether the elements that would be missing from the next key
        on are known to have this very key. They are not if the search ended early: where none of the elements that
        reach the key can be spared, or where the surplus is within rounding.
    """
    center, spread = model
    low_sum = total
    high_sum = total - total
    aim = gauge(needed, total)
    guess = tl.maximum(center - aim * spread, low.to(tl.float32))  # not NaN either
    guess = tl.minimum(guess, high.to(tl.float32)).to(tl.int32)
    margin = (spread * FIRST_MARGIN).to(tl.int32)
    slow = 0
    while _open(low, high, low_sum, high_sum, needed, total, KIND, STEP):
        width = high - low
        lower = _between(guess - margin, low + STEP, high - STEP, STEP)
        upper = _between(guess + margin, lower + STEP, high - STEP, STEP)
        found, beyond = measure(row, weight, lower, upper, KIND, B)
        if beyond >= needed:
            low = upper
            low_sum = beyond
        elif found >= needed:
            low = lower
            low_sum = found
            high = upper
            high_sum = beyond
        else:
            high = lower
            high_sum = found
        slow = tl.maximum(slow + tl.where(high - low > width // 3, 1, -1), 0)
        width = high - low
        low_gauge = gauge(low_sum, total)
        share = (low_gauge - aim) / (low_gauge - gauge(high_sum, total))
        share = tl.minimum(tl.maximum(share, LEAN), 1 - LEAN)  # not NaN either
        share = tl.where(slow >= PATIENCE, 1 / 2, share)
        part = tl.where(slow >= PATIENCE, 1 / 6, MARGIN)
        guess = low + (share * width.to(tl.float32)).to(tl.int32)
        margin = (part * width.to(tl.float32)).to(tl.int32)
    return low, low_sum, high - low == STEP


@triton.jit
def _open(low, high, low_sum, high_sum, needed, total, KIND: tl.constexpr, STEP: tl.constexpr):
    """Whether there is a key between, something to spare, and more than one element for which they may differ."""
    unit = value(low) if KIND == MASS else 1.0
    slack = tl.maximum(total * ROUNDING, unit) if KIND == MASS else 0.5
    return (high - low > STEP) & (low_sum - needed >= slack) & (low_sum - high_sum > 1.5 * unit)


@triton.jit
def _between(key, least, most, STEP: tl.constexpr):
    """The key, rounded to a multiple of ``STEP``, or the nearer limit; the higher one comes first."""
    return tl.minimum(tl.maximum(key & -STEP, least), most)
