# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that find the weight from which on a row's elements are kept.

Weights that are not negative sort like their bits read as integers, here called keys. ``search`` narrows a bracket of
two keys: from ``low`` on there is enough, from ``high`` on there is not. A step costs one pass over the row, which is
two instructions an element where the row is in registers (a comparison that gives 0.0 or 1.0, and a fused
multiply-add), and one sum over the block.

Bisection would take a step for each of the key's 31 bits. The first guess comes from a model instead, a logistic
distribution of the mass over the keys, which are the weights' logarithms roughly; the second one is Newton's from the
first; then follow interpolations, and bisection where two steps in a row have not halved the bracket. That settles a
row of attention in about nine steps and equal weights, the worst case, in less than fifty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

ROW = tl.constexpr(128)
"""Consecutive elements that a warp reads at once: four for each lane."""
INFINITE = tl.constexpr(0x7F800000)
"""The key of infinity, the highest of a weight. What is above is NaN's, which no weight reaches."""
TOLERANCE = tl.constexpr(2.0**-17)
"""Surplus mass, as a part of the total, that ends a search by mass."""
LEAN = tl.constexpr(0.02)
"""How far beyond the interpolated key to look, as a part of the bracket, so that its other end moves the next time."""
EDGE = tl.constexpr(0.01)
"""The least distance from the ends of the bracket, as a part of it."""

MASS, COUNT, TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a search adds up: mass, elements, or elements of one weight, whose keys then fall with their positions."""


class Blocks(NamedTuple):
    """How a program holds its row.

    Attributes:
        resident: elements that stay in registers: a power of two, at least 128 for each warp.
        tile: elements that are read at a time of those beyond; likewise.
        warps: of a program.
        registers: that a thread may have.
    """

    resident: int
    tile: int
    warps: int
    registers: int


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

    Triton deals out rows of 128 elements to the warps in turn. Here the rows of a warp follow each other, so that it
    holds one stretch of consecutive positions.
    """
    i = tl.arange(0, SIZE)
    return start + i // ROW % B.warps * (SIZE // B.warps) + i // (ROW * B.warps) * ROW + i % ROW


@triton.jit
def position_parts(start, SIZE: tl.constexpr, B: tl.constexpr):
    """The same positions as a sum of ``[rows, 1]``, which the compiler knows, and ``[1, 128 * warps]``."""
    i = tl.arange(0, ROW * B.warps)
    row = tl.arange(0, SIZE // (ROW * B.warps)) * ROW
    return row[:, None], (start + i // ROW * (SIZE // B.warps) + i % ROW)[None, :]


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
    position = positions(start, SIZE, B)
    # Four elements a lane, for 16-bit scores too.
    weight = tl.load(tl.max_contiguous(row.scores + position, 4), mask=position < row.limit).to(tl.float32)
    weight = tl.maximum(weight, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND != MASS:
        weight = tl.where(weight < float("inf"), weight, float("inf"))
    if (start < row.first) | (start + SIZE > row.last):
        weight = tl.where(within(start, row.first, row.last, SIZE, B), weight, 0.0)
    return weight


@triton.jit
def fold(amounts, SIZE: tl.constexpr, B: tl.constexpr):
    """Sums ``[128 * warps]`` of ``[SIZE]`` amounts: each thread adds its own."""
    return tl.sum(tl.reshape(amounts, [SIZE // (ROW * B.warps), ROW * B.warps]), 0)


@triton.jit
def reaching(row, weight, start, key, tied, KIND: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """Mass or number of a tile's weights whose key is at least ``key``, folded."""
    if KIND == TIES:
        until = tl.maximum(tl.minimum(row.width - key + 1, row.last), row.first)
        inside = ((weight == tied) & within(start, row.first, until, SIZE, B)).to(tl.float32)
    else:
        inside = (weight >= value(key)).to(tl.float32)
    return fold(inside * weight if KIND == MASS else inside, SIZE, B)


@triton.jit
def measure(row, weight, key, tied, KIND: tl.constexpr, B: tl.constexpr):
    """Mass or number of a row's weights whose key is at least ``key``."""
    parts = reaching(row, weight, 0, key, tied, KIND, B.resident, B)
    for start in range(B.resident, row.last, B.tile):
        tile = read(row, start, KIND, B.tile, B)
        parts += reaching(row, tile, start, key, tied, KIND, B.tile, B)
    return tl.sum(parts)


@triton.jit
def log_odds(part, whole):
    """Logarithm of the odds of a part; bounded, so that neither all nor nothing is infinite."""
    least = 1e-6 * whole
    return tl.log((part + least) / (whole - part + least))


@triton.jit
def search(
    row,
    weight,
    needed,
    total,
    low,
    high,
    model,
    tied,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    B: tl.constexpr,
):
    """The highest key, a multiple of ``STEP``, from which on a row has ``needed`` of its ``total``.

    Args:
        weight: the row's resident tile.
        low, high: a bracket: ``needed`` is reached from ``low`` on, and not from ``high`` on.
        model: centre and spread of the mass, or number, over the keys, as floats.
        tied: the weight whose elements are searched, for ``TIES``.

    Returns:
        the key; the mass, or number, from there on; and whether the elements that would be missing from the next key
        on all have this very key. They need not if the search ended early: by mass, once the surplus is within the
        tolerance, and always, once a single element lies between the ends of the bracket.
    """
    low_sum = total
    high_sum = 0.0
    slack = TOLERANCE * total if KIND == MASS else 0.0
    center, spread = model
    odds = log_odds(needed, total)
    guess = center - odds * spread
    tries = 0
    slow = 0
    single = False
    while (high - low > STEP) & (low_sum - needed > slack) & (not single):
        width = high - low
        guess = tl.minimum(tl.maximum(guess, low.to(tl.float32)), high.to(tl.float32))  # not NaN either
        middle = tl.minimum(tl.maximum(guess.to(tl.int32) & -STEP, low + STEP), high - STEP)
        found = measure(row, weight, middle, tied, KIND, B)
        if found >= needed:
            low = middle
            low_sum = found
            lean = LEAN
        else:
            high = middle
            high_sum = found
            lean = -LEAN
        between = low_sum - high_sum
        single = between <= 1.5 * (value(low) if KIND == MASS else 1.0)
        slow = tl.where(high - low > width // 2, slow + 1, 0)
        share = tl.minimum(tl.maximum((low_sum - needed) / between + lean, EDGE), 1 - EDGE)
        guess = low.to(tl.float32) + tl.where(slow >= 2, 0.5, share) * (high - low).to(tl.float32)
        if tries == 0:
            missed = log_odds(found, total) - odds
            guess = middle.to(tl.float32) + spread * (missed + tl.where(missed > 0, 0.1, -0.1))
        tries += 1
    return low, low_sum, (high - low == STEP) & (not single)
