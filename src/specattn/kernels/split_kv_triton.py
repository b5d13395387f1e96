# mypy: disable-error-code="no-untyped-def"
"""The Triton side of :mod:`specattn.kernels.split_kv`: shares, the running softmax, joining."""

from __future__ import annotations

import triton
import triton.language as tl

STRETCH = tl.constexpr(16)


@triton.jit
def share(length, split, splits, BLOCK_N: tl.constexpr):
    """First token of this program's share, and the first that is not; whole tiles but for the request's last."""
    tokens = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    first = split * tokens
    return first, tl.minimum(first + tokens, length)


@triton.jit
def whole(last):
    """The end of the stretch of ``STRETCH`` tokens in which a share ends: up to there scores are written.

    A mask that may end at any token would have them written one by one.
    """
    return tl.cdiv(last, STRETCH) * STRETCH


@triton.jit
def pool_rows(pages, positions, mask, PAGE: tl.constexpr):
    """Pool rows, int64, of token ``positions``, from a request's row of the block table."""
    page = tl.load(pages + positions // PAGE, mask=mask, other=0)
    return page.to(tl.int64) * PAGE + positions % PAGE


@triton.jit
def finite(peak):
    """What to subtract from logits with this maximum: minus infinity less itself would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def absorb(logits, peak, total):
    """Add a tile of ``logits`` ``[M, N]`` to running softmaxes with maximum ``peak`` and sum ``total``, ``[M]``.

    Returns the tile's weights, the factor of what was summed before, and the new maximum and sum.
    """
    higher = tl.maximum(peak, tl.max(logits, 1))
    anchor = finite(higher)
    weights = tl.exp(logits - anchor[:, None])
    keep = tl.exp(peak - anchor)
    return weights, keep, higher, total * keep + tl.sum(weights, 1)


@triton.jit
def log_sum(peak, total):
    """Log-sum-exp of a running softmax; minus infinity of an empty one."""
    return peak + tl.log(positive(total))


@triton.jit
def positive(total):
    """A divisor: what was summed over nothing is 0 and stays so."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def arrive(arrivals):
    """Count this program's part as written; true in the last of the axis 1 of the grid, which sees all parts."""
    # All threads have written before one of them counts; the atomic orders that before what the last one reads.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def join_lse(part_lse, live, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Log-sum-exp ``[M]`` over the parts ``[splits, M]``; rows that are not ``live`` give minus infinity."""
    splits = tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    # Past the first-level cache, which other programs' stores do not reach.
    mask = (s < splits) & live[None, :]
    lse = tl.load(part_lse + s * BLOCK_M + m, mask=mask, other=float("-inf"), cache_modifier=".cg")
    peak = tl.max(lse, 0)
    return log_sum(peak, tl.sum(tl.exp(lse - finite(peak)[None, :]), 0))


@triton.jit
def join_outputs(parts, part_lse, lse, live, BLOCK_M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Outputs ``[M, D]``: the mean of the parts ``[splits, M, D]``, each weighted by its share of ``lse``."""
    splits = tl.num_programs(1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    result = tl.zeros([BLOCK_M, D], tl.float32)
    for first in range(0, splits, CHUNK):
        s = first + tl.arange(0, CHUNK)
        at = s[:, None] * BLOCK_M + m[None, :]
        mask = (s < splits)[:, None] & live[None, :]
        weight = tl.load(part_lse + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp(weight - finite(lse)[None, :])
        part = tl.load(
            parts + at[:, :, None] * D + d[None, None, :],
            mask=mask[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(weight[:, :, None] * part, 0)
    return result
