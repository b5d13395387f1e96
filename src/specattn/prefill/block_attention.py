"""Block-sparse attention of a prefill: the Triton kernel where it runs, its reference elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specattn.kernels.block_sparse_attention import block_sparse_attention as reference
from specattn.kernels.blocks import BlockLists
from specattn.kernels.device import has_kernels

DTYPES = (torch.bfloat16, torch.float16)
"""In float32 the matrix units would round; the reference does not."""


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockLists, **options: Any
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of :func:`specattn.kernels.block_sparse_attention.block_sparse_attention`."""
    if value.dtype not in DTYPES or not has_kernels(value.device):
        return reference(query, key, value, blocks, **options)
    from specattn.kernels import block_sparse_attention_triton as kernel

    if kernel.unsupported(query, value, blocks) is not None:
        return reference(query, key, value, blocks, **options)
    return kernel.block_sparse_attention(query, key, value, blocks, **options)
