"""Block-sparse attention of a prefill: the Triton kernel where it runs, its reference elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specattn.kernels import block_sparse_launch as kernel
from specattn.kernels.block_sparse_attention import block_sparse_attention as reference
from specattn.kernels.blocks import BlockLists
from specattn.kernels.device import has_kernels

DTYPES = (torch.bfloat16, torch.float16)
"""In float32 the matrix units would round; the reference does not."""


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockLists, **options: Any
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of :func:`specattn.kernels.block_sparse_attention.block_sparse_attention`."""
    runs = value.dtype in DTYPES and has_kernels(value.device)
    attend = (
        kernel.block_sparse_attention if runs and not kernel.unsupported(query, value, blocks) else reference
    )
    return attend(query, key, value, blocks, **options)
