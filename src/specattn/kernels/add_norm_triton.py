"""The Triton kernel of :mod:`specattn.kernels.add_norm`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`specattn.kernels.add_norm.add_norm` as one launch.

    Without a residual the sum is ``x`` itself, not a copy.
    """
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    add_norm_kernel[(rows,)](
        x, residual, weight, normed, total, hidden, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return normed, total


@triton.jit
def add_norm_kernel(
    x, residual, weight, normed, total, hidden, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + row + column, mask=inside, other=0.0)
    dtype = value.dtype
    if HAS_RESIDUAL:
        # Rounded as the sum of two tensors is, so that the norm sees what the next layer sees.
        value = (
            value.to(tl.float32) + tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        ).to(dtype)
        tl.store(total + row + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scaled = (wide * scale).to(dtype).to(tl.float32) * gain
    tl.store(normed + row + column, scaled.to(dtype), mask=inside)
