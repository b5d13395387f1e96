# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that draw tokens of a row in the order of their positions, and list them with their log-weights.

Probabilities are integers, multiples of 2**-40, so that the sums before a token are exact; a token's weight is made of
the very integer by which it was drawn. See :func:`specattn.selection.weighted_tail.systematic`.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_BITS = tl.constexpr(40)
UNIT = tl.constexpr(float(1 << 40))
ROUND_UP = tl.constexpr((1 << 40) - 1)
"""Takes a sum to the next multiple of the unit."""


@triton.jit
def comb_of(shift):
    """Where the sum of probabilities begins, for a comb that was shifted."""
    return ROUND_UP - shift


@triton.jit
def write_drawn(indices, log_weights, position, length, other, chance, power, comb, count):
    """List a tile's tokens: of the ``other`` ones those that are drawn, with probability ``chance``, else all.

    Args:
        comb, count: the sum of the probabilities, and of the entries, before the tile.

    Returns:
        The two sums behind it.
    """
    part = tl.where(other, tl.maximum((chance * UNIT).to(tl.int64), 1), 0)
    end = comb + tl.cumsum(part, 0)
    drawn = (end >> UNIT_BITS) > ((end - part) >> UNIT_BITS)
    listed = (position < length) & (drawn | ~other)
    slot = count + tl.cumsum(listed.to(tl.int32), 0) - 1
    tl.store(indices + slot, position, mask=listed)
    log_weight = tl.where(other, -power * tl.log(tl.maximum(part.to(tl.float32), 1.0) / UNIT), 0.0)
    tl.store(log_weights + slot, log_weight, mask=listed)
    return comb + tl.sum(part), count + tl.sum(listed.to(tl.int32))


@triton.jit
def clear_behind(indices, log_weights, count, capacity, TILE: tl.constexpr):
    """Write the entries that a list of ``count`` leaves unused."""
    for start in range(count, capacity, TILE):
        unused = start + tl.arange(0, TILE)
        tl.store(indices + unused, -1, mask=unused < capacity)
        tl.store(log_weights + unused, 0.0, mask=unused < capacity)
