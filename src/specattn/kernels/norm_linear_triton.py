"""The Triton kernel of :mod:`specattn.kernels.norm_linear`: a program reads all channels of its outputs' weights."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specattn.kernels.default_tilings import norm_tiling
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.product_tiling import (
    ProductTiling,
    ProductWorkspace,
    check_contiguous,
    shared_tiles,
    tile_rows,
)
from specattn.kernels.weight_tiles_triton import (
    fetch_ahead,
    join_parts,
    leave_part,
    multiply,
    multiply_described,
    operands,
    wait_for_launch_before,
)


def norm_linear(
    normed: NormedRows,
    weight: Tensor,
    bias: Tensor | None = None,
    workspace: ProductWorkspace | None = None,
    *,
    tiling: ProductTiling | None = None,
) -> Tensor:
    """:func:`specattn.kernels.norm_linear.norm_linear` as one launch, of contiguous tensors and few rows.

    A workspace is made, by launches of its own, if ``None`` and programs share outputs.
    """
    return _launch(normed, weight, bias, len(weight), False, workspace, tiling)


def norm_gated_linear(normed: NormedRows, weight: Tensor, *, tiling: ProductTiling | None = None) -> Tensor:
    """:func:`specattn.kernels.norm_linear.norm_gated_linear` in the same way."""
    return _launch(normed, weight, None, len(weight) // 2, True, None, tiling)


def _launch(
    normed: NormedRows,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    is_gated: bool,
    workspace: ProductWorkspace | None,
    tiling: ProductTiling | None,
) -> Tensor:
    x, squares = normed.rows, normed.squares
    rows, channels = x.shape
    check_contiguous(x, squares, weight, bias)
    tiling = tiling or norm_tiling(
        rows, outputs, channels, x.device, itemsize=x.element_size(), is_gated=is_gated
    )
    written = 1 if squares is None else len(squares)
    block_m, tiles = tile_rows(rows), triton.cdiv(outputs, tiling.columns)
    lines = 2 * tiling.columns if is_gated else tiling.columns
    parts, steps = tiling.cut(channels)
    partials, arrivals = shared_tiles(workspace, tiles, parts, block_m * lines, x.device)
    lines_read = weight.view(2, outputs, channels) if is_gated and tiling.described else weight
    rows_read, weights_read = operands(x, lines_read, block_m, tiling)
    out = x.new_empty(rows, outputs)
    norm_linear_kernel[(tiles, parts)](
        rows_read, squares, weights_read, weight if tiling.ahead else None, bias, out, partials, arrivals,
        rows, channels, outputs, written, steps, normed.eps,
        GATED=is_gated, PARTS=parts, SHRINK=shrinkage(x.dtype), SQUARES=triton.next_power_of_2(written),
        EVEN_N=outputs % tiling.columns == 0, EVEN_K=channels % tiling.depth == 0,
        BLOCK_M=block_m, BLOCK_N=tiling.columns, BLOCK_K=tiling.depth,
        DESCRIBED=tiling.described, SWAPPED=tiling.swapped, EARLY=tiling.early, AHEAD=tiling.ahead,
        num_warps=tiling.warps, num_stages=tiling.stages, **({"launch_pdl": True} if tiling.early else {}),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "written", "steps"])
def norm_linear_kernel(
    x,  # [rows, channels]; a descriptor of that if DESCRIBED
    squares,  # float32 [written, rows], or None
    weight,  # [outputs, channels], or [2 * outputs, channels] if GATED; a descriptor of [2, outputs, channels] if both
    lines,  # the weights again, if AHEAD
    bias,  # [outputs] or None
    out,  # [rows, outputs]
    partials,  # float32 [tiles, PARTS, BLOCK_M, lines]; None if there is one part
    arrivals,  # int32 [tiles], 0 between launches
    rows,
    channels,
    outputs,
    written,
    steps,  # of BLOCK_K channels, of a part
    eps,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    SHRINK: tl.constexpr,
    SQUARES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWAPPED: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    LINES: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    line = tile * BLOCK_N + tl.arange(0, LINES)
    inside = line < outputs
    if GATED:
        # Gates and values take turns, so that both products of an output are one thread's.
        pair = tile * BLOCK_N + tl.arange(0, LINES) // 2
        line = pair + tl.arange(0, LINES) % 2 * outputs
        inside = pair < outputs
    part = tl.program_id(1)
    first = part * steps * BLOCK_K
    last = channels if PARTS == 1 else tl.minimum(first + steps * BLOCK_K, channels)
    if EARLY:
        if AHEAD > 0:
            fetch_ahead(lines, line, inside, first, channels, AHEAD)
        wait_for_launch_before()
    square = None
    if squares is not None:
        # Asked for before the product and looked at behind it.
        one = tl.arange(0, SQUARES)
        known = (one < written)[:, None] & (row < rows)[None, :]
        square = tl.load(squares + one[:, None] * rows + row[None, :], mask=known, other=0.0)
    if DESCRIBED:
        acc = multiply_described(
            x, weight, tile * BLOCK_N, first, last, GATED, BLOCK_M, LINES, BLOCK_K, SWAPPED
        )  # fmt: skip
    else:
        acc = multiply(
            x, weight, line, inside, first, last, rows, channels,
            EVEN_N, EVEN_K, BLOCK_M, LINES, BLOCK_K, SWAPPED,
        )  # fmt: skip
    if PARTS == 1:
        _finish(
            acc, square, bias, out, row, output, rows, channels, outputs, eps, GATED, DESCRIBED, SHRINK
        )  # fmt: skip
    else:
        place = partials + tile * (PARTS * BLOCK_M * LINES)
        place += row[:, None] * LINES + tl.arange(0, LINES)[None, :]
        kept = (row < rows)[:, None]
        if leave_part(acc, place, kept, arrivals + tile, part, PARTS):
            total = join_parts(place, kept, PARTS)
            _finish(
                total, square, bias, out, row, output, rows, channels, outputs, eps, GATED, DESCRIBED, SHRINK
            )  # fmt: skip


@triton.jit
def _finish(
    acc, square, bias, out, row, output, rows, channels, outputs, eps,
    GATED: tl.constexpr, HALVES: tl.constexpr, SHRINK: tl.constexpr,
):  # fmt: skip
    """Finish a tile: what the norm still divides by, bias and gate. ``HALVES``: all gates come before the values."""
    if square is not None:
        acc *= (tl.rsqrt(tl.sum(square, 0) / channels + eps) / SHRINK)[:, None]
    inside = output < outputs
    dtype = out.dtype.element_ty
    if GATED:
        rounded = acc.to(dtype).to(tl.float32)
        if HALVES:
            pairs = rounded.reshape(row.shape[0], 2, output.shape[0]).permute(0, 2, 1)
        else:
            pairs = rounded.reshape(row.shape[0], output.shape[0], 2)
        gate, value = tl.split(pairs)
        # Rounded where separate operations would round.
        result = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * value
    elif bias is not None:
        result = acc + tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        result = acc
    live = (row < rows)[:, None] & inside[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], result.to(dtype), mask=live)
