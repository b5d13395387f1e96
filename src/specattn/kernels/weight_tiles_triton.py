# mypy: disable-error-code="no-untyped-def"
"""What the products of few rows share: how rows and weights are fetched and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specattn.kernels.product_tiling import ProductTiling


def operands(
    x: Tensor, weight: Tensor, block_m: int, lines: list[int], tiling: ProductTiling
) -> tuple[object, object]:
    """What a kernel gets of rows and weights: themselves, or descriptors of the tiles that it reads.

    Args:
        x: ``[rows, channels]``.
        weight: ``[..., channels]``, in the shape in which a program's ``lines`` ``[...]`` of it are one tile.
    """
    if not tiling.described:
        return x, weight
    return (
        TensorDescriptor.from_tensor(x, [block_m, tiling.depth]),
        TensorDescriptor.from_tensor(weight, [*lines, tiling.depth]),
    )


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
):
    """The product ``[BLOCK_M, BLOCK_N]`` over the channels ``first`` to ``last``, a multiple of ``BLOCK_K`` apart."""
    row = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        channel = (start + tl.arange(0, BLOCK_K))[None, :]
        tile = load(x, row[:, None], (row < rows)[:, None], channel, channels, False, EVEN_K)
        w = load(weight, output[:, None], inside[:, None], channel, channels, EVEN_N, EVEN_K)
        acc = tl.dot(tile, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def multiply_described(
    x,  # descriptor of [rows, channels]
    weight,  # descriptor of [lines, channels], or of [planes, lines, channels] if PAIRED
    plane,
    line,
    first,
    last,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same by Hopper's tensor memory accelerator, of the lines from ``line`` on; if PAIRED, of two planes."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        w = weight.load([plane, line, start] if PAIRED else [line, start]).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(x.load([0, start]), tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def pair_and_member(BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Of which pair a program's lines are, and whether its first or its second.

    The members take turns, so that both are one thread's; ``HALVES``: first all of the one kind, then of the other.
    """
    number = tl.arange(0, BLOCK_N)
    if HALVES:
        return number % (BLOCK_N // 2), number // (BLOCK_N // 2)
    return number // 2, number % 2


@triton.jit
def split_pairs(acc, HALVES: tl.constexpr):
    """The first members' columns of ``acc`` ``[BLOCK_M, BLOCK_N]``, and the second ones'."""
    PAIRS: tl.constexpr = acc.shape[1] // 2
    if HALVES:
        return tl.split(acc.reshape(acc.shape[0], 2, PAIRS).permute(0, 2, 1))
    return tl.split(acc.reshape(acc.shape[0], PAIRS, 2))


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
def load_squares(squares, row, rows, parts, PARTS: tl.constexpr):
    """Sums of squares ``[PARTS, BLOCK_M]``, 0 of what there is not: asked for before a product, used behind it."""
    part = tl.arange(0, PARTS)
    known = (part < parts)[:, None] & (row < rows)[None, :]
    return tl.load(squares + part[:, None] * rows + row[None, :], mask=known, other=0.0)


@triton.jit
def root(square, channels, eps, SHRINK: tl.constexpr):
    """What rows ``[BLOCK_M]`` are multiplied by to be normalised."""
    return tl.rsqrt(tl.sum(square, 0) / channels + eps) / SHRINK
