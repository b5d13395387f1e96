"""Block-sparse attention on a GPU: the launcher of its kernel, and what the kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.block_sparse_attention import ROW_GROUP
from specattn.kernels.blocks import BlockLists
from specattn.kernels.paged import check_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_BLOCK, LARGEST_BLOCK = 16, 128
LEAST_CHANNELS, MOST_CHANNELS = 32, 256
ENTRIES = 256  # of a list, looked at together to find where it needs a mask


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
    """What :func:`specattn.kernels.block_sparse_attention.block_sparse_attention` computes, with its arguments.

    Weights are rounded to the values' dtype before they are multiplied. What a group of rows skips counts as skipped,
    but the product is left out of the computation only where all groups of a query block agree.

    Raises:
        UsageError: what :func:`unsupported` names, scales without integers or integers without, a ``row_group`` that
            does not divide the query block, channels that are not contiguous.
    """
    from specattn.kernels.block_sparse_attention_triton import block_sparse_kernel

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
