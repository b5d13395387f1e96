# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of :mod:`specattn.kernels.block_sparse_attention`, and its launcher.

A program has one query block and goes through its list; the longest lists of a head, those of the last rows, begin
first. Of a causal list only the last blocks need a mask, so the list is taken in two stretches, of which the first
has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.block_sparse_attention import ROW_GROUP
from specattn.kernels.blocks import BlockLists
from specattn.kernels.paged import check_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_BLOCK, LARGEST_BLOCK = 16, 128
LEAST_CHANNELS, MOST_CHANNELS = 32, 256
ENTRIES = 256  # of a list, looked at together to find where it needs a mask

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class BlockTiling:
    """What can be tuned; nothing here changes a result.

    Attributes:
        warps: of a program.
        stages: one more than the key blocks that are fetched ahead.
        registers: the most that a thread may have; 128 let two programs of eight warps share a multiprocessor.
    """

    warps: int = 8
    stages: int = 3
    registers: int | None = None


def unsupported(query: Tensor, value: Tensor, blocks: BlockLists) -> str | None:
    """Why the kernel cannot take these; ``None`` if it can. Shapes as the reference has them."""
    for name in ("query_block", "key_block"):
        size = getattr(blocks, name)
        if not LEAST_BLOCK <= size <= LARGEST_BLOCK or size & (size - 1):
            return f"{name}={size} is no power of two from {LEAST_BLOCK} to {LARGEST_BLOCK}"
    if query.shape[-1] > MOST_CHANNELS:
        return f"its heads have {query.shape[-1]} channels, of which {MOST_CHANNELS} at most fit"
    if value.dtype not in DTYPES or query.dtype not in (torch.int8, value.dtype):
        return f"queries of {query.dtype} and values of {value.dtype} are not multiplied here"
    return None


def default_tiling(key: Tensor, value: Tensor, blocks: BlockLists) -> BlockTiling:
    """What fits into the registers of a thread and the shared memory of an A100."""
    fetched = blocks.key_block * key.shape[-1] * (key.element_size() + value.element_size())
    return BlockTiling(warps=8 if blocks.query_block > 64 else 4, stages=3 if fetched <= 32 * 1024 else 2)


def padded_channels(head_dim: int) -> int:
    """Channels of a tile: a power of two, from 32 on, as products of integers want."""
    return max(LEAST_CHANNELS, 1 << (head_dim - 1).bit_length())


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockLists,
    *,
    start: int | None,
    scaling: float,
    scales: tuple[Tensor, Tensor] | None = None,
    lam: Tensor | None = None,
    row_group: int = ROW_GROUP,
    tiling: BlockTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """What the reference computes, with its arguments.

    Weights are rounded to the values' dtype before they are multiplied. What a group of rows skips counts as skipped,
    but the product is left out of the computation only where all groups of a query block agree.

    Raises:
        UsageError: what :func:`unsupported` names, scales without integers or integers without, a ``row_group`` that
            does not divide the query block, channels that are not contiguous.
    """
    _check(query, key, value, blocks, scales, row_group)
    batch, query_heads, rows, head_dim = query.shape
    out = torch.empty_like(query, dtype=value.dtype)
    skipped = torch.empty(blocks.counts.shape, dtype=torch.int32, device=query.device)
    query_scales, key_scales = (part.contiguous() for part in scales) if scales else (None, None)
    tiling = tiling or default_tiling(key, value, blocks)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    block_sparse_kernel[(blocks.counts.shape[2], query_heads, batch)](
        query,
        key,
        value,
        query_scales,
        key_scales,
        lam,
        blocks.indices.contiguous(),
        blocks.counts.contiguous(),
        out,
        skipped,
        scaling,
        start or 0,
        rows,
        key.shape[2],
        key.shape[1],
        blocks.indices.shape[-1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        CAUSAL=start is not None,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_channels(head_dim),
        BLOCK_M=blocks.query_block,
        BLOCK_N=blocks.key_block,
        ROW_GROUP=row_group,
        LISTED=ENTRIES,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **options,
    )
    return out, skipped


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockLists,
    scales: tuple[Tensor, Tensor] | None,
    row_group: int,
) -> None:
    reason = unsupported(query, value, blocks)
    if reason:
        raise UsageError(f"block-sparse attention on a GPU: {reason}; use the PyTorch reference")
    batch, query_heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    query_blocks, key_blocks = -(-rows // blocks.query_block), -(-length // blocks.key_block)
    check_shape("key", key, batch, kv_heads, length, head_dim)
    check_shape("value", value, batch, kv_heads, length, head_dim)
    check_shape("counts", blocks.counts, batch, query_heads, query_blocks)
    check_shape("indices", blocks.indices, batch, query_heads, query_blocks, None)
    if query_heads % kv_heads:
        raise UsageError(f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    if query.dtype != key.dtype or (query.dtype == torch.int8) != (scales is not None):
        raise UsageError(
            f"queries are {query.dtype}, keys {key.dtype}, {'with' if scales else 'without'} scales: "
            "both must have one dtype, and scales belong to integers"
        )
    if scales is not None:
        check_shape("query scales", scales[0], batch, query_heads, query_blocks)
        check_shape("key scales", scales[1], batch, kv_heads, key_blocks)
    if blocks.query_block % row_group:
        raise UsageError(f"row_group={row_group} does not divide query_block={blocks.query_block}")
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        raise UsageError("the channels of queries, keys and values must be contiguous; call .contiguous()")


# What changes from chunk to chunk is not specialised, so that a kernel is compiled once for a model.
VARYING = ["start", "rows", "length", "capacity"]


@triton.jit(do_not_specialize=VARYING)
def block_sparse_kernel(
    query,  # [batch, query_heads, rows, HEAD_DIM]
    key,  # [batch, kv_heads, length, HEAD_DIM]
    value,
    query_scales,  # float32 [batch, query_heads, query_blocks], or None
    key_scales,  # float32 [batch, kv_heads, key_blocks], or None
    lam,  # float32 [query_heads], or None: nothing is skipped
    indices,  # int32 [batch, query_heads, query_blocks, capacity]
    counts,  # int32 [batch, query_heads, query_blocks]
    out,  # [batch, query_heads, rows, HEAD_DIM]
    skipped,  # int32 [batch, query_heads, query_blocks]
    scaling,
    start,
    rows,
    length,
    kv_heads,
    capacity,
    query_batch,  # strides, in elements
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    out_batch,
    out_head,
    out_row,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Grid: query blocks, query heads, requests."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // (tl.num_programs(1) // kv_heads)
    unit = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block

    dims = tl.arange(0, BLOCK_D)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (dims < HEAD_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * query_row + dims[None, :]
    q = tl.load(query + batch * query_batch + head * query_head + at, mask=live, other=0)
    last_seen = tl.full([BLOCK_M], 0, tl.int32) + length - 1
    seen_by_all = length
    if CAUSAL:
        last_seen = tl.minimum(start + row, last_seen)
        seen_by_all = tl.minimum(start + block * BLOCK_M + 1, length)
    last_seen = tl.where(row < rows, last_seen, -1)

    factor = scaling * LOG2_E  # exponentials are powers of two here
    if query_scales is not None:
        factor *= tl.load(query_scales + unit)
        key_scales += (batch * kv_heads + kv_head) * tl.cdiv(length, BLOCK_N)
    patience = float("inf")
    if lam is not None:
        patience = tl.load(lam + head) * LOG2_E

    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    entries = indices + unit * capacity
    count = tl.load(counts + unit)
    whole = _entries_before(seen_by_all // BLOCK_N, entries, count, LISTED)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    skips = tl.zeros([BLOCK_M], tl.int32)
    for masked in tl.static_range(2):
        high, total, acc, skips = _attend(
            high,
            total,
            acc,
            skips,
            q,
            key,
            value,
            key_scales,
            entries,
            whole if masked else 0,
            count if masked else whole,
            last_seen,
            factor,
            patience,
            length,
            key_row,
            value_row,
            lam is not None,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            ROW_GROUP,
            masked,
        )
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = row.to(tl.int64)[:, None] * out_row + dims[None, :]
    tl.store(out + batch * out_batch + head * out_head + at, result.to(out.dtype.element_ty), mask=live)
    tl.store(skipped + unit, tl.sum(skips))


@triton.jit
def _attend(
    high,  # [BLOCK_M]: the largest logit so far
    total,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_D]
    skips,  # int32 [BLOCK_M]: visible keys whose values were skipped
    q,
    key,
    value,
    key_scales,
    entries,
    first,
    stop,
    last_seen,
    factor,
    patience,
    length,
    key_row,
    value_row,
    SKIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The entries ``first`` to ``stop`` of a list; without a mask all rows see all of their blocks."""
    block = tl.load(entries + first, mask=first < stop, other=0)
    # Loads that only a branch uses are not fetched ahead, those that are handed on to the next iteration are.
    if SKIPS:
        v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    for entry in range(first, stop):
        k = _tile(key, block, key_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
        if not SKIPS:
            v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
        scale = factor
        if key_scales is not None:
            scale *= tl.load(key_scales + block)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        if MASKED:
            token = block * BLOCK_N + tl.arange(0, BLOCK_N)
            logits = tl.where(token[None, :] <= last_seen[:, None], logits, float("-inf"))
        local = tl.max(logits, 1)
        higher = tl.maximum(high, local)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - base[:, None])
        keep = tl.exp2(high - base)
        total = total * keep + tl.sum(p, 1)
        high = higher
        if SKIPS:
            visible = tl.minimum(tl.maximum(last_seen - block * BLOCK_N + 1, 0), BLOCK_N)
            nearest = _nearest(tl.where(visible > 0, local - base, float("-inf")), BLOCK_M, ROW_GROUP)
            skip = nearest < -patience
            skips += tl.where(skip, visible, 0)
            # Where all rows skip, no maximum has moved, and keep is 1.
            if tl.max(nearest, 0) >= -patience:
                p = tl.where(skip[:, None], 0.0, p)
                acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        block = tl.load(entries + entry + 1, mask=entry + 1 < stop, other=0)
        if SKIPS:
            v = _tile(value, block, value_row, length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    return high, total, acc, skips


@triton.jit
def _nearest(gap, BLOCK_M: tl.constexpr, ROW_GROUP: tl.constexpr):
    """For each row of ``gap`` ``[BLOCK_M]`` the largest of its group."""
    groups: tl.constexpr = BLOCK_M // ROW_GROUP
    largest = tl.max(tl.reshape(gap, [groups, ROW_GROUP]), 1)
    return tl.reshape(tl.broadcast_to(largest[:, None], [groups, ROW_GROUP]), [BLOCK_M])


@triton.jit
def _tile(
    tokens,
    block,
    stride,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A block of keys or values ``[BLOCK_N, BLOCK_D]``, filled up with zeros."""
    lanes = tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    at = tokens + (block * BLOCK_N).to(tl.int64) * stride + (lanes * stride + dims)
    if MASKED or HEAD_DIM != BLOCK_D:
        return tl.load(at, mask=(block * BLOCK_N + lanes < length) & (dims < HEAD_DIM), other=0)
    else:
        return tl.load(at)


@triton.jit
def _entries_before(limit, entries, count, LISTED: tl.constexpr):
    """How many entries of a list, which ascends, are below ``limit``."""
    found = 0
    for first in range(0, count, LISTED):
        at = first + tl.arange(0, LISTED)
        block = tl.load(entries + at, mask=at < count, other=limit)
        found += tl.sum((block < limit).to(tl.int32))
    return found
