# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that find the weight from which on a row's elements are kept.

Weights that are not negative sort like their bits read as integers, here called keys. ``search`` narrows a bracket of
two keys: from ``low`` on there is enough, from ``high`` on there is not. A step costs one pass over the row, which is
two instructions an element where the row is in registers (a comparison that gives 0.0 or 1.0, and a fused
multiply-add), and one sum over the block.

Bisection would take a step for each of the key's 31 bits. Here the first guess comes from a model, a logistic
distribution of the mass over the keys (roughly the weights' logarithms), the second is Newton's from the first, and
the others interpolate the logarithm of the odds of the mass found, in which such a distribution is a straight line.
Where that fails, steps bisect. Where one more element is enough, it is looked for itself, because the keys between it
and the bracket's end would take further steps to exclude. Rows of attention mostly take five to ten steps; no row
takes more than twice the steps of bisection and a few.
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
"""How far beyond the interpolated key to look, as a part of the bracket, so that its other end moves the next time.

Also the least distance from either end.
"""
PUSH = tl.constexpr(0.1 * 2.0**23)
"""The same for the second guess, on the scale of ``gauge``."""
PATIENCE = tl.constexpr(3)
"""How many more steps may have left over half of the bracket than have not, before one bisects it."""

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
    return as_weights(_read_scores(row, start, SIZE, B), KIND)


@triton.jit
def _read_scores(row, start, SIZE: tl.constexpr, B: tl.constexpr):
    """The scores of a tile: 0 outside of ``[first, last)``."""
    # Each branch reads: masking behind one read, Triton makes a selection of the branch, and masks every tile.
    if (start >= row.first) & (start + SIZE <= row.last):
        scores = _load(row, start, False, SIZE, B)
    else:
        scores = read_unmasked(row, start, SIZE, B)
        scores = tl.where(within(start, row.first, row.last, SIZE, B), scores, 0.0)
    return scores


@triton.jit
def read_unmasked(row, start, SIZE: tl.constexpr, B: tl.constexpr):
    """The scores of a tile; outside of ``[first, last)`` whatever is there."""
    if start + SIZE <= row.limit:  # noqa: SIM108 - a selection would read twice
        scores = _load(row, start, False, SIZE, B)
    else:
        scores = _load(row, start, True, SIZE, B)
    return scores


@triton.jit
def _load(row, start, LIMITED: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    vector: tl.constexpr = B.vector
    position = positions(start, SIZE, B)
    source = tl.max_contiguous(row.scores + position, vector)
    scores = tl.load(source, mask=position < row.limit) if LIMITED else tl.load(source)
    return scores.to(tl.float32)


@triton.jit
def as_weights(scores, KIND: tl.constexpr):
    """Scores without negative ones and, except where mass is added up, with infinity for NaN."""
    weight = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
def measure(row, weight, key, KIND: tl.constexpr, B: tl.constexpr):
    """Mass or number of a row's weights whose key is at least ``key``, a positive one."""
    parts = reaching(weight, key, KIND, B.resident, B)
    for start in range(B.resident, row.last, B.tile):
        # By mass, scores will do: negative ones do not reach the key, and 0 times them is 0.
        tile = _read_scores(row, start, B.tile, B) if KIND == MASS else read(row, start, KIND, B.tile, B)
        parts += reaching(tile, key, KIND, B.tile, B)
    found = tl.sum(by_thread(parts, B))
    if KIND == MASS:  # noqa: SIM102 - `and` would compile it for numbers, too
        if found != found:  # 0 times -inf is NaN; the row has none, or it would not be searched by mass
            parts = reaching(weight, key, KIND, B.resident, B)
            for start in range(B.resident, row.last, B.tile):
                parts += reaching(read(row, start, KIND, B.tile, B), key, KIND, B.tile, B)
            found = tl.sum(by_thread(parts, B))
    return found


@triton.jit
def heaviest(row, weight, key, KIND: tl.constexpr, B: tl.constexpr):
    """The highest key of a row's weights that is at most ``key``."""
    highest = _highest(weight, key, B.resident, B)
    for start in range(B.resident, row.last, B.tile):
        highest = tl.maximum(highest, _highest(read(row, start, KIND, B.tile, B), key, B.tile, B))
    return tl.max(highest)


@triton.jit
def _highest(weight, key, SIZE: tl.constexpr, B: tl.constexpr):
    below = tl.where(weight <= value(key), weight, 0.0).to(tl.int32, bitcast=True)
    row: tl.constexpr = LANES * B.vector
    return tl.max(tl.reshape(below, [SIZE // (row * B.warps), row * B.warps]), 0)


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
    high_sum = 0.0
    aim = gauge(needed, total)
    low_gauge = gauge(total, total)
    high_gauge = gauge(total - total, total)
    guess = center - aim * spread
    unit = value(low) if KIND == MASS else 1.0
    slack = tl.maximum(total * ROUNDING, unit) if KIND == MASS else 0.5
    tries = 0
    slow = 0
    while (high - low > STEP) & (low_sum - needed >= slack) & (low_sum - high_sum > 1.5 * unit):
        width = high - low
        guess = tl.minimum(tl.maximum(guess, low.to(tl.float32)), high.to(tl.float32))  # not NaN either
        middle = tl.minimum(tl.maximum(guess.to(tl.int32) & -STEP, low + STEP), high - STEP)
        if needed - high_sum <= unit:
            middle = tl.maximum(heaviest(row, weight, high - STEP, KIND, B), low + STEP)
            high = middle + STEP
        found = measure(row, weight, middle, KIND, B)
        found_gauge = gauge(found, total)
        if found >= needed:
            low = middle
            low_sum = found
            low_gauge = found_gauge
            lean = LEAN
        else:
            high = middle
            high_sum = found
            high_gauge = found_gauge
            lean = -LEAN
        if KIND == MASS:
            unit = value(low)
            slack = tl.maximum(total * ROUNDING, unit)
        slow = tl.maximum(slow + tl.where(high - low > width // 2, 1, -1), 0)
        share = (low_gauge - aim) / (low_gauge - high_gauge) + lean
        share = tl.where(slow >= PATIENCE, 0.5, tl.minimum(tl.maximum(share, LEAN), 1 - LEAN))
        guess = low.to(tl.float32) + share * (high - low).to(tl.float32)
        if tries == 0:
            missed = found_gauge - aim
            guess = middle.to(tl.float32) + spread * (missed + PUSH * _sign(missed))
        tries += 1
    return low, low_sum, high - low == STEP


@triton.jit
def _sign(x):
    return tl.where(x < 0, -1.0, 1.0)
