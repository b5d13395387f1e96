# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.echoes`: a program goes through the text before one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.echoes import LONGEST, NOWHERE

BLOCK = 8192
LONGEST_TEXT = 1 << 27
"""Positions that a rank has room for, beside how many tokens agree."""


def echoes(text: Tensor, slots: Tensor, starts: Tensor, rows: int, matches: int) -> Tensor:
    """:func:`specattn.kernels.echoes.echoes_reference` in one launch; each slot's text, and ``slots``, are contiguous.

    Raises:
        UsageError: the text is longer than the kernel can tell.
    """
    if text.shape[1] > LONGEST_TEXT:
        raise UsageError(f"texts of {text.shape[1]:,} tokens are too long for echoes: up to {LONGEST_TEXT:,}")
    found = text.new_empty(len(slots), rows * matches)
    if found.numel():
        echoes_kernel[(len(slots), rows)](
            text, slots, starts, found, text.stride(0), starts.stride(0), rows,
            MATCHES=matches, PLACES=triton.next_power_of_2(matches), LONGEST=LONGEST, NOWHERE=NOWHERE,
            SPAN=LONGEST_TEXT, BLOCK=min(BLOCK, triton.next_power_of_2(text.shape[1])), num_warps=8,
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["rows"])
def echoes_kernel(
    text,  # int32 [slots, length]
    slots,  # [batch]
    starts,  # [batch]
    found,  # int32 [batch, rows * MATCHES]
    text_slot,  # strides, in elements
    starts_stride,
    rows,
    MATCHES: tl.constexpr,
    PLACES: tl.constexpr,  # a power of two from MATCHES on
    LONGEST: tl.constexpr,
    NOWHERE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.program_id(1)
    own = tl.load(starts + request * starts_stride).to(tl.int32) + row
    text += tl.load(slots + request).to(tl.int64) * text_slot
    place = tl.arange(0, PLACES)
    best = tl.zeros([PLACES], tl.int32)  # ranks: how many tokens agree, then the position; 0 is no match
    for start in range(0, own, BLOCK):
        position = start + tl.arange(0, BLOCK)
        agree = position < own
        number = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(LONGEST):
            fed = tl.load(text + own - back, mask=own >= back, other=-1)
            there = agree & (position >= back)
            before = tl.load(text + position - back, mask=there, other=-2)
            agree = there & (before == fed)
            number += agree.to(tl.int32)
        rank = tl.where(number > 0, number * SPAN + position, 0)
        for _ in tl.static_range(MATCHES):
            highest = tl.max(rank)
            worst = tl.min(tl.where(place < MATCHES, best, 0x7FFFFFFF))
            # The first of those that are as bad: only matches that there are not are alike.
            at = tl.min(tl.where((best == worst) & (place < MATCHES), place, PLACES))
            best = tl.where((place == at) & (highest > worst), highest, best)
            rank = tl.where(rank == highest, 0, rank)
    behind = tl.where(best > 0, best % SPAN + 1, NOWHERE)
    tl.store(found + (request * rows + row) * MATCHES + place, behind, mask=place < MATCHES)
