# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.head_mixture`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_mixture_kernel(
    logits,  # [batch, ROWS, heads, length]
    lse,  # float32 [batch, ROWS, heads]
    weights,  # float32 [targets, heads]
    lengths,  # int32 [batch]
    out,  # [batch, targets, out_length]
    heads,
    targets,
    length,
    out_length,
    logits_batch,  # strides, in elements
    logits_row,
    logits_head,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: blocks of tokens, requests."""
    request = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    h = tl.arange(0, BLOCK_H)
    visible = tl.load(lengths + request)
    at = request * logits_batch + h[:, None].to(tl.int64) * logits_head + n[None, :]
    # Whole tiles are read, because a mask that ends at any token would forbid wide loads.
    some = tl.program_id(0) * BLOCK_L < visible
    readable = (h < heads)[:, None] & (n < length)[None, :] & some
    mean = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    for row in tl.static_range(ROWS):
        logit = tl.load(logits + row * logits_row + at, mask=readable, other=0.0).to(tl.float32)
        total = tl.load(lse + (request * ROWS + row) * heads + h, mask=h < heads, other=0.0)
        seen = (h < heads)[:, None] & (n < visible - (ROWS - 1) + row)[None, :]
        mean += tl.where(seen, tl.exp(logit - total[:, None]), 0.0)
    mean *= 1 / ROWS

    for first in range(0, targets, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        weight = tl.load(
            weights + t[:, None] * heads + h[None, :],
            mask=(t < targets)[:, None] & (h < heads)[None, :],
            other=0.0,
        )
        mixed = tl.dot(weight, mean, input_precision=PRECISION)
        to = out + (request * targets + t[:, None]) * out_length + n[None, :]
        written = (t < targets)[:, None] & (n < out_length)[None, :]
        tl.store(to, mixed.to(out.dtype.element_ty), mask=written)
