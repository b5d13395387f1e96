# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that write the kept positions of a row as an ascending list."""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.threshold_triton import LANES

WORD = tl.constexpr(32)
"""Bits of the words in which a tile's kept positions are marked."""
MANTISSA = tl.constexpr(2.0**23)
"""Added to a smaller integer in float32, it leaves that integer in the lowest bits."""


@triton.jit
def write_marked(out, words, start, base, room, SIZE: tl.constexpr):
    """Write the positions of a tile that ``words`` mark to ``out[base:]``, if they fit into ``room``.

    Returns:
        where the next tile's positions go: ``base`` and the number of those kept.

    The words are scanned, and of each word one set bit after the other becomes an entry, as often as the fullest word
    has one.
    """
    number = popcount(words)
    total, most = tl.reduce((number, number), 0, _sum_and_most)
    end = base + total
    if end <= room:
        target = out + (base + tl.cumsum(number, 0) - number)
        position = start + tl.arange(0, SIZE // WORD) * WORD
        for _ in range(most):
            tl.store(target, position + lowest_bit(words), mask=words != 0)
            words &= words - 1
            target += 1
    return end


@triton.jit
def marks(weight, threshold, SIZE: tl.constexpr, B: tl.constexpr):
    """Words ``[SIZE // 32]``, in the order of the positions, whose bits tell which weights reach ``threshold``."""
    rows: tl.constexpr = SIZE // (LANES * B.vector * B.warps)
    lanes: tl.constexpr = WORD // B.vector  # that share a word
    # Added up in float32, for which there are units beside those that compare: with a factor that the compiler does not
    # know to be 1, or it would add up integers after all.
    bit = (1 << tl.arange(0, B.vector)).to(tl.float32) * tl.where(threshold < 0, 2.0, 1.0)
    kept = tl.reshape((weight >= threshold).to(tl.float32), [SIZE // B.vector, B.vector])
    own = tl.sum(kept * bit[None, :], 1) + MANTISSA
    own = own.to(tl.int32, bitcast=True) & ((1 << B.vector) - 1)
    own = tl.reshape(own, [rows, B.warps, LANES // lanes, lanes])
    words = tl.sum(own << (tl.arange(0, lanes) * B.vector)[None, None, None, :], 3)
    words = tl.reshape(tl.permute(words, 1, 0, 2), [SIZE // WORD])
    # As they are, eight words are in the hands of four lanes each; gathered, of one.
    return tl.gather(words, tl.arange(0, SIZE // WORD), 0)


@triton.jit
def ones_from(place, SIZE: tl.constexpr):
    """Words ``[SIZE // 32]`` like those of ``marks``, with the bits from the tile's element ``place`` on set."""
    before = tl.minimum(tl.maximum(place - tl.arange(0, SIZE // WORD) * WORD, 0), WORD)
    return tl.where(before < WORD, -1 << before, 0)


@triton.jit
def popcount(words):
    """How many bits of each int32 are set."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = eights + (eights >> 8)
    return (halves + (halves >> 16)) & 63


@triton.jit
def lowest_bit(words):
    """The place of each int32's lowest bit that is set: the exponent of that bit alone."""
    alone = (words & -words).to(tl.float32)
    return ((alone.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _sum_and_most(sum_a, most_a, sum_b, most_b):
    return sum_a + sum_b, tl.maximum(most_a, most_b)
