"""The Triton kernel of :mod:`specattn.kernels.schedule`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
"""Numbers of a stretch: unit, start, stop, first program, parts, request, KV head. Eight fill a sector of memory."""

VARYING = ["units", "blocks", "kv_heads", "programs", "count_batch", "count_layer", "count_head"]


@triton.jit(do_not_specialize=VARYING)
def schedule_kernel(
    counts,  # [batch, layers, kv_heads]
    stretches,  # int32 [layers, programs, FIELDS]
    units,
    blocks,
    kv_heads,
    programs,
    count_batch,  # strides, in elements
    count_layer,
    count_head,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Grid: layers."""
    layer = tl.program_id(0)
    unit = tl.arange(0, UNITS)
    request, head = unit // blocks // kv_heads, unit // blocks % kv_heads
    at = request * count_batch + layer * count_layer + head * count_head
    count = tl.load(counts + at, mask=unit < units, other=0)
    # An empty list has a tile too: somebody must write its zeros.
    tiles = tl.where(unit < units, tl.maximum(tl.cdiv(count, BLOCK_N), 1), 0)

    # The least length of a stretch with which there are enough programs.
    low = tl.cdiv(tl.sum(tiles), programs)
    high = tl.max(tiles)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.cdiv(tiles, middle)) <= programs:
            high = middle
        else:
            low = middle + 1

    parts = tl.cdiv(tiles, high)
    first = tl.cumsum(parts) - parts
    stretches += layer * programs * FIELDS
    for part in range(tl.max(parts)):
        to = stretches + (first + part) * FIELDS
        here = part < parts
        of = tl.maximum(parts, 1)
        tl.store(to, unit, mask=here)
        tl.store(to + 1, tiles * part // of * BLOCK_N, mask=here)
        tl.store(to + 2, tl.minimum(tiles * (part + 1) // of * BLOCK_N, count), mask=here)
        tl.store(to + 3, first, mask=here)
        tl.store(to + 4, parts, mask=here)
        tl.store(to + 5, request, mask=here)
        tl.store(to + 6, head, mask=here)
    for base in range(tl.sum(parts), programs, UNITS):
        tl.store(stretches + (base + unit) * FIELDS, -1, mask=base + unit < programs)
