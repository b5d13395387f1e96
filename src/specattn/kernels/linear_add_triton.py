"""The Triton kernel of :mod:`specattn.kernels.linear_add`.

Where there are fewer tiles of outputs than multiprocessors, several programs share a tile's channels. Each leaves its
part, and the last of them to arrive sums all, in their order, so that the result does not depend on who is last.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specattn.kernels.default_tilings import split_tiling
from specattn.kernels.early_launch_triton import let_next_start, wait_for_launch_before
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.product_tiling import ProductTiling, ProductWorkspace, check_contiguous, tile_rows
from specattn.kernels.weight_tiles_triton import (
    multiply,
    multiply_described,
    operands,
)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stream: Tensor,
    gain: Tensor,
    eps: float,
    workspace: ProductWorkspace | None = None,
    *,
    tiling: ProductTiling | None = None,
) -> tuple[Tensor, NormedRows]:
    """:func:`specattn.kernels.linear_add.linear_add` as one launch, of contiguous tensors and few rows.

    A workspace is made, by launches of its own, if ``None``.
    """
    rows, channels = x.shape
    outputs = len(weight)
    check_contiguous(x, weight, bias, stream, gain)
    tiling = tiling or split_tiling(rows, outputs, channels, x.device, itemsize=x.element_size())
    block_m, tiles = tile_rows(rows), triton.cdiv(outputs, tiling.columns)
    parts, steps = tiling.cut(channels)
    out, scaled = torch.empty_like(stream), torch.empty_like(stream)
    squares = stream.new_empty(tiles, rows, dtype=torch.float32)
    partials = arrivals = None
    if parts > 1:
        workspace = workspace or ProductWorkspace.allocate(x.device)
        workspace.check(tiles, parts, block_m * tiling.columns)
        partials, arrivals = workspace.parts, workspace.arrivals
    linear_add_kernel[(tiles, parts)](
        *operands(x, weight, block_m, [tiling.columns], tiling),
        bias, stream, gain, out, scaled, squares, partials, arrivals,
        rows, channels, outputs, steps,
        PARTS=parts, SHRINK=shrinkage(x.dtype),
        EVEN_N=outputs % tiling.columns == 0, EVEN_K=channels % tiling.depth == 0,
        BLOCK_M=block_m, BLOCK_N=tiling.columns, **tiling.options,
    )  # fmt: skip
    return out, NormedRows(scaled, squares, eps)


@triton.jit(do_not_specialize=["rows", "steps"])
def linear_add_kernel(
    x,  # [rows, channels]; a descriptor of that if DESCRIBED
    weight,  # [outputs, channels], likewise
    bias,  # [outputs] or None
    stream,  # [rows, outputs]
    gain,  # [outputs]
    out,  # [rows, outputs]
    scaled,  # [rows, outputs]
    squares,  # float32 [tiles, rows]
    partials,  # float32 [tiles, PARTS, BLOCK_M, BLOCK_N]; None if there is one part
    arrivals,  # int32 [tiles], 0 between launches
    rows,
    channels,
    outputs,
    steps,  # of BLOCK_K channels, of a part
    PARTS: tl.constexpr,
    SHRINK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    output = tile * BLOCK_N + column
    first = part * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, channels)
    inside = output < outputs
    # What is added to the product is asked for before it, so that it is there.
    if bias is not None:
        bias = tl.load(bias + output, mask=inside, other=0.0)
    factor = tl.load(gain + output, mask=inside, other=0.0)
    if EARLY:
        wait_for_launch_before()
    live = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * outputs + output[None, :]
    if PARTS == 1:
        before = tl.load(stream + at, mask=live, other=0.0)
    if DESCRIBED:
        acc = multiply_described(
            x, weight, 0, tile * BLOCK_N, first, last, False, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        acc = multiply(
            x, weight, output, inside, first, last, rows, channels,
            EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if EARLY:
        let_next_start()
    if PARTS == 1:
        _add(acc, bias, before, factor, out, scaled, squares + tile * rows, row, inside, at, rows, SHRINK)
    else:
        place = partials + tile * (PARTS * BLOCK_M * BLOCK_N) + row[:, None] * BLOCK_N + column[None, :]
        kept = (row < rows)[:, None]
        tl.store(place + part * (BLOCK_M * BLOCK_N), acc, mask=kept)
        # All threads have written before one of them counts; the atomic orders that before what the last one reads.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(arrivals + tile, 0)
            before = tl.load(stream + at, mask=live, other=0.0)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in tl.static_range(PARTS):  # unrolled: their loads do not wait for each other
                # Past the first-level cache, which other programs' stores do not reach.
                one = place + other * (BLOCK_M * BLOCK_N)
                total += tl.load(one, mask=kept, other=0.0, cache_modifier=".cg")
            _add(
                total, bias, before, factor, out, scaled, squares + tile * rows, row, inside, at, rows, SHRINK
            )


@triton.jit
def _add(
    acc, bias, before, factor, out, scaled, squares, row, inside, at, rows, SHRINK: tl.constexpr
):  # fmt: skip
    """Finish a tile: bias and stream, rounded where separate operations would round, and the norm's beginning."""
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    live = (row < rows)[:, None] & inside[None, :]
    dtype = out.dtype.element_ty
    new = (acc.to(dtype).to(tl.float32) + before.to(tl.float32)).to(dtype)
    tl.store(out + at, new, mask=live)
    wide = new.to(tl.float32)
    factor = factor.to(tl.float32) * SHRINK
    tl.store(scaled + at, (wide * factor[None, :]).to(dtype), mask=live)
    tl.store(squares + row, tl.sum(tl.where(inside[None, :], wide * wide, 0.0), 1), mask=row < rows)
