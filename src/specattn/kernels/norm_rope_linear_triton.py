"""The Triton kernel of :func:`specattn.kernels.norm_linear.norm_rope_linear`.

A program has some channels of one head, and those that they are rotated with, half a head further on.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specattn.kernels.default_tilings import norm_tiling
from specattn.kernels.early_launch_triton import let_next_start, wait_for_launch_before
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.product_tiling import ProductTiling, check_contiguous, tile_rows
from specattn.kernels.rope_append_triton import rotated
from specattn.kernels.weight_tiles_triton import (
    load_squares,
    multiply,
    multiply_described,
    operands,
    pair_and_member,
    root,
    split_pairs,
)


def norm_rope_linear(
    normed: NormedRows,
    weight: Tensor,
    bias: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    tiling: ProductTiling | None = None,
) -> Tensor:
    """:func:`specattn.kernels.norm_linear.norm_rope_linear` as one launch, of contiguous tensors and few rows.

    ``head_dim`` must be a power of two, and no program have more channels than a head.
    """
    x, squares = normed.rows, normed.squares
    tokens, channels = x.shape
    outputs, (_, kv_heads, head_dim) = len(weight), keys.shape
    check_contiguous(x, squares, weight, bias, cosine, sine, positions, rows, keys, values)
    tiling = tiling or norm_tiling(tokens, outputs, channels, x.device, itemsize=x.element_size())
    block_m, columns = tile_rows(tokens), min(tiling.columns, head_dim)
    halves = weight.view(-1, head_dim // 2, channels)
    parts = 1 if squares is None else len(squares)
    query = x.new_empty(tokens, outputs // head_dim - 2 * kv_heads, head_dim)
    norm_rope_linear_kernel[(outputs // columns,)](
        *operands(x, halves, block_m, [2, columns // 2], tiling), squares, bias, cosine, sine, positions, rows,
        query, keys, values, tokens, channels, parts, normed.eps,
        QUERY_HEADS=query.shape[1], KV_HEADS=kv_heads, HALF=head_dim // 2,
        SHRINK=shrinkage(x.dtype), SQUARES=triton.next_power_of_2(parts), EVEN_K=channels % tiling.depth == 0,
        BLOCK_M=block_m, BLOCK_N=columns, **tiling.options,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["tokens", "parts"])
def norm_rope_linear_kernel(
    x,  # [tokens, channels]; a descriptor of that if DESCRIBED
    weight,  # [(QUERY_HEADS + 2 * KV_HEADS) * 2, HALF, channels], likewise
    squares,  # float32 [parts, tokens], or None
    bias,  # one for each line of the weights, or None
    cosine,  # float32 [positions, 2 * HALF]
    sine,
    positions,  # [tokens]
    rows,  # [tokens], of the pool
    query,  # [tokens, QUERY_HEADS, 2 * HALF]
    keys,  # [pool rows, KV_HEADS, 2 * HALF]
    values,
    tokens,
    channels,
    parts,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SHRINK: tl.constexpr,
    SQUARES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.arange(0, BLOCK_M)
    known = token < tokens
    PAIRS: tl.constexpr = BLOCK_N // 2
    head = tl.program_id(0) * PAIRS // HALF
    first = tl.program_id(0) * PAIRS % HALF
    pair, half = pair_and_member(BLOCK_N, DESCRIBED)
    line = head * (2 * HALF) + first + pair + half * HALF
    if bias is not None:
        bias = tl.load(bias + line)
    if EARLY:
        wait_for_launch_before()
    position = tl.load(positions + token, mask=known, other=0)
    row = tl.load(rows + token, mask=known, other=0).to(tl.int64)
    if squares is not None:
        square = load_squares(squares, token, tokens, parts, SQUARES)
    if DESCRIBED:
        acc = multiply_described(
            x, weight, head * 2, first, 0, channels, True, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        acc = multiply(
            x, weight, line, line >= 0, 0, channels, tokens, channels,
            True, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if EARLY:
        let_next_start()
    if squares is not None:
        acc *= root(square, channels, eps, SHRINK)[:, None]
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    dtype: tl.constexpr = query.dtype.element_ty
    # Rounded where separate operations would round.
    x_half, y_half = split_pairs(acc.to(dtype), DESCRIBED)
    channel = (first + tl.arange(0, PAIRS))[None, :]
    live = known[:, None]
    if head < QUERY_HEADS + KV_HEADS:
        place = position[:, None] * (2 * HALF) + channel
        x_half, y_half = rotated(
            x_half.to(tl.float32), y_half.to(tl.float32), cosine, sine, place, live, HALF, dtype
        )
    if head < QUERY_HEADS:
        out = query + ((token.to(tl.int64) * QUERY_HEADS + head) * (2 * HALF))[:, None] + channel
    elif head < QUERY_HEADS + KV_HEADS:
        out = keys + ((row * KV_HEADS + head - QUERY_HEADS) * (2 * HALF))[:, None] + channel
    else:
        out = values + ((row * KV_HEADS + head - QUERY_HEADS - KV_HEADS) * (2 * HALF))[:, None] + channel
    tl.store(out, x_half, mask=live)
    tl.store(out + HALF, y_half, mask=live)
