"""What a GPU would compile of the block-sparse kernel, so that it can be compiled where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from specattn.kernels.block_sparse_attention import ROW_GROUP
from specattn.kernels.block_sparse_attention_triton import block_sparse_kernel
from specattn.kernels.block_sparse_launch import ENTRIES, default_tiling, padded_channels
from specattn.kernels.blocks import BlockLists
from specattn.kernels.compilation import Variant

POINTERS = {
    "query_scales": "*fp32",
    "key_scales": "*fp32",
    "lam": "*fp32",
    "indices": "*i32",
    "counts": "*i32",
    "skipped": "*i32",
}
"""Those that have the same type for every model."""

FEW_BYTES = 96
WIDE_BYTES = 640
"""What may spill: a tile of 128 rows of 256 channels fills half of the registers, and more of an A100's."""

SPARGE = [(64, True), (128, True), (256, True), (128, False), (256, False)]
"""Channels, and whether queries and keys are integers: SpargeAttn, 128 rows over 64 keys."""

PATTERNS = [(64, 64), (128, 64), (128, 128)]
"""Channels and sizes of both blocks: the patterns of MInference and FlexPrefill."""


def variants(dtype: str = "bf16") -> Iterator[Variant]:
    """The kernel as the prefill methods launch it, causal."""
    for head_dim, int8 in SPARGE:
        yield _variant(dtype, head_dim, int8=int8, query_block=128, key_block=64, row_group=ROW_GROUP)
    for head_dim, block in PATTERNS:
        yield _variant(
            dtype, head_dim, int8=False, query_block=block, key_block=block, row_group=block, skips=False
        )


def _variant(
    dtype: str,
    head_dim: int,
    *,
    int8: bool,
    query_block: int,
    key_block: int,
    row_group: int,
    skips: bool = True,
) -> Variant:
    lists = BlockLists(torch.empty(0), torch.empty(0), query_block, key_block)
    value = torch.empty(1, head_dim, dtype=torch.bfloat16)
    tiling = default_tiling(value.to(torch.int8) if int8 else value, value, lists)
    constants: dict[str, Any] = {"CAUSAL": True, "HEAD_DIM": head_dim, "BLOCK_D": padded_channels(head_dim)}
    constants |= {"BLOCK_M": query_block, "BLOCK_N": key_block, "ROW_GROUP": row_group, "LISTED": ENTRIES}
    constants |= {} if int8 else {"query_scales": None, "key_scales": None}
    constants |= {} if skips else {"lam": None}
    operand = "*i8" if int8 else f"*{dtype}"
    data = {"query": operand, "key": operand, "value": f"*{dtype}", "out": f"*{dtype}", "scaling": "fp32"}
    known = POINTERS | data | dict.fromkeys(constants, "constexpr")
    names = block_sparse_kernel.arg_names
    signature = {name: known.get(name, "i32") for name in names}
    strides = tuple(name for name in names if name.endswith(("_batch", "_head", "_row")))
    aligned = tuple(name for name in names if signature[name].startswith("*") or name in strides)
    stack = WIDE_BYTES if head_dim > 128 else FEW_BYTES
    return Variant(
        block_sparse_kernel,
        signature,
        constants,
        tiling.warps,
        tiling.stages,
        aligned,
        tiling.registers,
        stack,
    )
