"""The Triton kernel of :mod:`specattn.kernels.norm_linear`: a program reads all channels of its outputs' weights."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specattn.kernels.default_tilings import norm_tiling
from specattn.kernels.early_launch_triton import let_next_start, wait_for_launch_before
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.product_tiling import ProductTiling, check_contiguous, tile_rows
from specattn.kernels.weight_tiles_triton import (
    load_squares,
    multiply,
    multiply_described,
    operands,
    pair_and_member,
    root,
    split_pairs,
)


def norm_linear(
    normed: NormedRows, weight: Tensor, bias: Tensor | None = None, *, tiling: ProductTiling | None = None
) -> Tensor:
    """:func:`specattn.kernels.norm_linear.norm_linear` as one launch, of contiguous tensors and few rows."""
    return _launch(normed, weight, bias, len(weight), False, tiling)


def norm_gated_linear(normed: NormedRows, weight: Tensor, *, tiling: ProductTiling | None = None) -> Tensor:
    """:func:`specattn.kernels.norm_linear.norm_gated_linear` in the same way."""
    return _launch(normed, weight, None, len(weight) // 2, True, tiling)


def _launch(
    normed: NormedRows,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    is_gated: bool,
    tiling: ProductTiling | None,
) -> Tensor:
    x, squares = normed.rows, normed.squares
    rows, channels = x.shape
    check_contiguous(x, squares, weight, bias)
    tiling = tiling or norm_tiling(
        rows, outputs, channels, x.device, itemsize=x.element_size(), is_gated=is_gated
    )
    parts = 1 if squares is None else len(squares)
    block_m, lines = tile_rows(rows), [2, tiling.columns] if is_gated else [tiling.columns]
    shaped = weight.view(2, outputs, channels) if is_gated else weight
    out = x.new_empty(rows, outputs)
    norm_linear_kernel[(triton.cdiv(outputs, tiling.columns),)](
        *operands(x, shaped, block_m, lines, tiling),
        squares, bias, out, rows, channels, outputs, parts, normed.eps,
        GATED=is_gated, SHRINK=shrinkage(x.dtype), SQUARES=triton.next_power_of_2(parts),
        EVEN_N=outputs % tiling.columns == 0, EVEN_K=channels % tiling.depth == 0,
        BLOCK_M=block_m, BLOCK_N=tiling.columns, **tiling.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "parts"])
def norm_linear_kernel(
    x,  # [rows, channels]; a descriptor of that if DESCRIBED
    weight,  # [outputs, channels], or [2, outputs, channels] if GATED, likewise
    squares,  # float32 [parts, rows], or None
    bias,  # [outputs] or None
    out,  # [rows, outputs]
    rows,
    channels,
    outputs,
    parts,
    eps,
    GATED: tl.constexpr,
    SHRINK: tl.constexpr,
    SQUARES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    LINES: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    line = output
    inside = output < outputs
    if GATED:
        pair, member = pair_and_member(LINES, DESCRIBED)
        line = tile * BLOCK_N + pair + member * outputs
        inside = tile * BLOCK_N + pair < outputs
    if bias is not None:
        bias = tl.load(bias + line, mask=inside, other=0.0)
    if EARLY:
        wait_for_launch_before()
    if squares is not None:
        square = load_squares(squares, row, rows, parts, SQUARES)
    if DESCRIBED:
        acc = multiply_described(
            x, weight, 0, tile * BLOCK_N, 0, channels, GATED, BLOCK_M, LINES, BLOCK_K
        )  # fmt: skip
    else:
        acc = multiply(
            x, weight, line, inside, 0, channels, rows, channels,
            EVEN_N, EVEN_K, BLOCK_M, LINES, BLOCK_K,
        )  # fmt: skip
    if EARLY:
        let_next_start()
    if squares is not None:
        acc *= root(square, channels, eps, SHRINK)[:, None]
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    dtype = out.dtype.element_ty
    if GATED:
        gate, value = split_pairs(acc.to(dtype).to(tl.float32), DESCRIBED)
        # Rounded where separate operations would round.
        acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * value
    live = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], acc.to(dtype), mask=live)
