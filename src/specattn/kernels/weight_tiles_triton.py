# mypy: disable-error-code="no-untyped-def"
"""What the products of few rows share: how rows and weights are fetched and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from specattn.kernels.product_tiling import ProductTiling


def operands(x: Tensor, weight: Tensor, block_m: int, tiling: ProductTiling) -> tuple[object, object]:
    """What a kernel gets of rows and weights: themselves, or descriptors of the tiles that it reads."""
    if not tiling.described:
        return x, weight
    lines = [2] * (weight.dim() - 2) + [tiling.columns, tiling.depth]
    return (
        TensorDescriptor.from_tensor(x, [block_m, tiling.depth]),
        TensorDescriptor.from_tensor(weight, lines),
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
    SWAPPED: tl.constexpr,
):
    """The product ``[BLOCK_M, BLOCK_N]`` over the channels ``first`` to ``last``, a multiple of ``BLOCK_K`` apart.

    ``SWAPPED``: lines of weights are the tensor cores' rows, of which Hopper's take 64, and rows are their columns.
    """
    row = tl.arange(0, BLOCK_M)
    acc = _no_sums(BLOCK_M, BLOCK_N, SWAPPED)
    for start in range(first, last, BLOCK_K):
        channel = (start + tl.arange(0, BLOCK_K))[None, :]
        tile = load(x, row[:, None], (row < rows)[:, None], channel, channels, False, EVEN_K)
        w = load(weight, output[:, None], inside[:, None], channel, channels, EVEN_N, EVEN_K)
        acc = _add_product(acc, tile, w, SWAPPED)
    return tl.trans(acc) if SWAPPED else acc


@triton.jit
def multiply_described(
    x,  # descriptor of [rows, channels]
    weight,  # descriptor of [outputs, channels], or [2, outputs, channels] if GATED
    output,
    first,
    last,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """The same by Hopper's tensor memory accelerator, of the lines from ``output`` on; if GATED, gates then values."""
    acc = _no_sums(BLOCK_M, LINES, SWAPPED)
    for start in range(first, last, BLOCK_K):
        tile = x.load([0, start])
        w = weight.load([0, output, start] if GATED else [output, start]).reshape(LINES, BLOCK_K)
        acc = _add_product(acc, tile, w, SWAPPED)
    return tl.trans(acc) if SWAPPED else acc


@triton.jit
def _no_sums(BLOCK_M: tl.constexpr, LINES: tl.constexpr, SWAPPED: tl.constexpr):
    return tl.zeros([LINES, BLOCK_M] if SWAPPED else [BLOCK_M, LINES], tl.float32)


@triton.jit
def _add_product(acc, tile, w, SWAPPED: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(w, tl.trans(tile), acc, input_precision="ieee")
    else:
        acc = tl.dot(tile, tl.trans(w), acc, input_precision="ieee")
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
def leave_part(acc, place, kept, arrivals, part, PARTS: tl.constexpr):
    """Leave a part of a tile's sums where the others find it; whether all have left theirs.

    Args:
        acc: ``[BLOCK_M, BLOCK_N]``.
        place: pointers of that shape to the first part.
        kept: ``[BLOCK_M, 1]``: rows that there are.
        arrivals: of this tile; 0 again after the last.
    """
    tl.store(place + part * (acc.shape[0] * acc.shape[1]), acc, mask=kept)
    # All threads have written before one of them counts; the atomic orders that before what the last one reads.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if is_last:
        tl.store(arrivals, 0)
    return is_last


@triton.jit
def join_parts(place, kept, PARTS: tl.constexpr):
    """The sum of what all programs of a tile have left, in their order."""
    total = tl.zeros(place.shape, tl.float32)
    for part in tl.static_range(PARTS):  # unrolled: their loads do not wait for each other
        # Past the first-level cache, which other programs' stores do not reach.
        total += tl.load(
            place + part * (place.shape[0] * place.shape[1]), mask=kept, other=0.0, cache_modifier=".cg"
        )
    return total


@triton.jit
def fetch_ahead(lines, line, inside, first, channels, AHEAD: tl.constexpr):
    """Ask for the first ``AHEAD`` channels of weights, which no launch writes, while waiting for the one before.

    They come as far as the second-level cache, 128 bytes at a time.
    """
    step: tl.constexpr = 128 // (lines.dtype.element_ty.primitive_bitwidth // 8)
    channel = tl.minimum(first + tl.arange(0, AHEAD // step) * step, channels - 1)
    at = lines + tl.where(inside, line, 0)[:, None] * channels + channel[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_launch_before():
    """Of an early launch: let the next one start, then wait until all is written that this one reads."""
    cuda.gdc_launch_dependents()
    cuda.gdc_wait()
