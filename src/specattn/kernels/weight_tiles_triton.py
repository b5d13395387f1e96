# mypy: disable-error-code="no-untyped-def"
"""What the products of few rows share: how rows and weights are fetched and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

LINE = tl.constexpr(128)  # bytes that come from memory at once


@triton.jit
def multiply(
    x,  # [rows, channels]
    weight,  # [any, channels]
    output,  # [BLOCK_N]: lines of the weights
    inside,  # [BLOCK_N]: whether there is such a line
    first,
    last,
    rows,
    channels,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The product ``[BLOCK_M, BLOCK_N]`` over the channels ``first`` to ``last``, a multiple of ``BLOCK_K`` apart."""
    row = tl.arange(0, BLOCK_M)
    if SLICES == 1:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(first, last, BLOCK_K):
            channel = (start + tl.arange(0, BLOCK_K))[None, :]
            tile = load(x, row[:, None], (row < rows)[:, None], channel, channels, False, EVEN_K)
            w = load(weight, output[:, None], inside[:, None], channel, channels, EVEN_N, EVEN_K)
            acc = tl.dot(tile, tl.trans(w), acc, input_precision="ieee")
    else:
        # One after the other, the tensor core's steps take longer than what they multiply takes to come. So each warp
        # has a slice of the channels, and its own sum.
        STEP: tl.constexpr = BLOCK_K // SLICES
        slices = tl.zeros([SLICES, BLOCK_M, BLOCK_N], tl.float32)
        inner = tl.arange(0, SLICES)[:, None, None] * STEP + tl.arange(0, STEP)[None, None, :]
        for start in range(first, last, BLOCK_K):
            channel = start + inner
            tile = load(x, row[None, :, None], (row < rows)[None, :, None], channel, channels, False, EVEN_K)
            w = load(weight, output[None, :, None], inside[None, :, None], channel, channels, EVEN_N, EVEN_K)
            slices = tl.dot(tile, tl.permute(w, (0, 2, 1)), slices, input_precision="ieee")
        acc = tl.sum(slices, 0)
    return acc


@triton.jit
def load(matrix, line, inside, channel, channels, EVEN_LINES: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of ``[any, channels]``, 0 outside; without masks where there is no outside."""
    at = matrix + line * channels + channel
    if EVEN_LINES and EVEN_K:
        return tl.load(at)
    if EVEN_LINES:
        return tl.load(at, mask=channel < channels, other=0.0)
    if EVEN_K:
        return tl.load(at, mask=inside, other=0.0)
    return tl.load(at, mask=inside & (channel < channels), other=0.0)


@triton.jit
def prefetch(weight, output, inside, first, last, channels, LINES: tl.constexpr):
    """Have channels ``first`` to ``last`` of ``output`` brought to the second-level cache; wait for nothing."""
    STEP: tl.constexpr = LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
    # Outside of the weights, the first of them are asked for again.
    row = (weight + tl.where(inside, output, 0) * channels)[:, None]
    for start in range(first, last, LINES * STEP):
        channel = tl.minimum(start + tl.arange(0, LINES) * STEP, last - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [row + channel[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait_for_launch_before():
    """Of an early launch: let the next one start, then wait until all is written that this one reads."""
    cuda.gdc_launch_dependents()
    cuda.gdc_wait()
