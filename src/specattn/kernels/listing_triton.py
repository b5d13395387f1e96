# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton functions that write the kept positions of a row as an ascending list."""

from __future__ import annotations

import triton
import triton.language as tl

from specattn.kernels.threshold_triton import ROW, position_parts

LANES = tl.constexpr(32)


@triton.jit
def quarters(x, SIZE: tl.constexpr):
    """``[SIZE]`` as four ``[SIZE // 4]``: the first, second, third and fourth element of each lane's four."""
    even, odd = tl.split(tl.reshape(x, [SIZE // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def write_kept(out, weight, start, threshold, below, base, room, SIZE: tl.constexpr, B: tl.constexpr):
    """Write the positions of a tile's weights of at least ``threshold`` to ``out[base:]``, if they fit into ``room``.

    Returns:
        where the next tile's positions go: ``base`` and the number of those kept.

    Within a warp's row, lanes learn by a scan how many are kept in the lanes before them. Counts of four rows share
    an int32, eight bits for each (a row has 128 elements), and so one scan. A warp's rows are counted up in each
    thread, and only the warps' totals pass between warps. The four elements of a lane are stored apart, because
    Triton would move scattered elements between threads otherwise. ``below`` is the next lower float: comparing once
    more with it costs less than to keep the first comparison's result.
    """
    rows: tl.constexpr = SIZE // (ROW * B.warps)
    pack: tl.constexpr = 4 if rows % 4 == 0 else 1
    k0, k1, k2, k3 = quarters((weight >= threshold).to(tl.int32), SIZE)
    shift = (tl.arange(0, pack) * 8)[None, :, None, None]
    kept = tl.reshape(k0 + k1 + k2 + k3, [rows // pack, pack, B.warps, LANES])
    packed = tl.sum(kept << shift, 1)
    in_row = tl.broadcast_to(tl.sum(packed, 2, keep_dims=True), packed.shape)
    to_lane = tl.reshape((tl.cumsum(packed, 2)[:, None] >> shift) & 255, [rows, B.warps, LANES])
    in_row = tl.reshape((in_row[:, None] >> shift) & 255, [rows, B.warps, LANES])
    kept = tl.reshape(kept, [rows, B.warps, LANES])
    in_warp = tl.sum(tl.sum(kept, 2), 0)
    to_warp = base + tl.cumsum(in_warp, 0) - in_warp
    end = base + tl.sum(in_warp)
    if end <= room:
        slot = to_warp[None, :, None] + (tl.cumsum(in_row, 0) - in_row) + (to_lane - kept)
        target = out + tl.reshape(slot, [SIZE // 4])
        row, column = position_parts(start, SIZE, B)
        position = tl.reshape(row + column, [SIZE])
        store_four(target, quarters(weight > below, SIZE), quarters(position, SIZE)[0])
    return end


@triton.jit
def store_four(target, kept, position):
    """Store those of each lane's four positions, from ``position`` on, that are kept, one behind the other.

    The first, then the last, then those between them: where few are kept, most lanes have one or none, and the last
    stores are skipped by whole warps.
    """
    k0, k1, k2, k3 = kept
    number = k0.to(tl.int32) + k1.to(tl.int32) + k2.to(tl.int32) + k3.to(tl.int32)
    first = tl.where(k0, 0, tl.where(k1, 1, tl.where(k2, 2, 3)))
    last = tl.where(k3, 3, tl.where(k2, 2, 1))
    tl.store(target, position + first, mask=number > 0)
    tl.store(target + (number - 1), position + last, mask=number > 1)
    tl.store(target + 1, position + tl.where(k0 & k1, 1, 2), mask=number > 2)
    tl.store(target + 2, position + 2, mask=number > 3)
