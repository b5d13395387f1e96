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
    weight,  # [outputs, channels]
    row,  # [BLOCK_M]
    output,  # [BLOCK_N]
    first,
    last,
    rows,
    outputs,
    channels,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The product ``[BLOCK_M, BLOCK_N]`` over the channels ``first`` to ``last``, a multiple of ``BLOCK_K`` apart."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        tile = load_rows(x, row, channel, rows, channels, EVEN_K)
        w = load_weights(weight, output, channel, outputs, channels, EVEN_N, EVEN_K)
        acc = tl.dot(tile, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def load_rows(x, row, channel, rows, channels, EVEN_K: tl.constexpr):
    """``[rows, channels]``: a tile, 0 outside."""
    live = (row < rows)[:, None]
    if not EVEN_K:
        live &= (channel < channels)[None, :]
    return tl.load(x + row[:, None] * channels + channel[None, :], mask=live, other=0.0)


@triton.jit
def load_weights(
    weight, output, channel, outputs, channels, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """``[outputs, channels]``: a tile, 0 outside."""
    at = weight + output[:, None] * channels + channel[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(at)
    if EVEN_N:
        return tl.load(at, mask=(channel < channels)[None, :], other=0.0)
    if EVEN_K:
        return tl.load(at, mask=(output < outputs)[:, None], other=0.0)
    return tl.load(at, mask=(output < outputs)[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def prefetch_weights(weight, output, first, last, outputs, channels, LINES: tl.constexpr):
    """Have channels ``first`` to ``last`` of ``output`` brought to the second-level cache; wait for nothing."""
    STEP: tl.constexpr = LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
    # Outside of the weights some line is asked for again.
    row = (weight + tl.minimum(output, outputs - 1) * channels)[:, None]
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
