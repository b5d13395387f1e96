"""The tilings that products of few rows take: what was fastest on an H200, or next to it."""

from __future__ import annotations

from dataclasses import replace

import torch

from specattn.kernels.device import shared_memory, starts_early
from specattn.kernels.product_tiling import ProductTiling, programs, tile_rows

NARROW_ROWS, NARROW_HIDDEN = 32, 1024
"""Rows and channels of the stream up to which tiles are narrow, for launches that are over soon: Qwen2.5-0.5B's."""

DEPTH, STAGES, SPLIT_STAGES = 128, 5, 4
"""Of narrow tiles; last, of shared outputs."""

SHARED_FROM = 5120
"""Channels from which on narrow programs are two a multiprocessor: one fetches while the other starts or ends."""

DEEPEST_SPLIT = 16
"""Parts of a row of weights, at most."""

LEAST_PART = 192
"""Channels of a part: fewer take less time than joining the parts."""

WIDE_GATED = ProductTiling(columns=64, depth=64, warps=8, stages=4, described=True)
HALF_GATED = ProductTiling(columns=32, depth=64, stages=4)
"""With a gate, and of too few outputs for one tile of the former a multiprocessor."""

WIDE_NORM = ProductTiling(columns=32, depth=128, stages=6, described=True)
HALF_NORM = ProductTiling(columns=16, depth=128, stages=4, described=True)
"""After a norm, and of so few outputs that the former would leave most multiprocessors idle."""

LONG, WIDE_LONG = 8192, ProductTiling(columns=64, depth=64, stages=8)
SHORT, WIDE_SHORT = 2048, ProductTiling(columns=16, depth=128, stages=4, described=True)
WIDE_SPLIT = ProductTiling(columns=32, depth=128, stages=4, described=True)
"""Into the stream, of so many channels and more, of fewer (if there are many rows), and otherwise."""

RESERVED = 2048
"""Bytes of shared memory that CUDA keeps, and that warps exchange data in."""


def norm_tiling(
    rows: int, outputs: int, channels: int, device: torch.device, *, itemsize: int = 2, is_gated: bool = False
) -> ProductTiling:
    """Of a product that follows a norm; its outputs are never shared."""
    factor = 2 if is_gated else 1
    if rows <= NARROW_ROWS and channels <= NARROW_HIDDEN:
        columns = 32 if outputs >= 32 * programs(device) else 16
        return _narrow(columns, factor, STAGES, itemsize, device)
    if is_gated:
        base = WIDE_GATED if outputs >= WIDE_GATED.columns * programs(device) else HALF_GATED
    else:
        base = WIDE_NORM if 3 * outputs >= WIDE_NORM.columns * programs(device) else HALF_NORM
    return _wide(base, factor, rows, channels, itemsize, device)


def split_tiling(
    rows: int, outputs: int, channels: int, device: torch.device, *, itemsize: int = 2
) -> ProductTiling:
    """Of a product into the stream: as many parts as give every multiprocessor a program, or nearly."""
    each = programs(device) / outputs
    if rows <= NARROW_ROWS and outputs <= NARROW_HIDDEN:
        tiling = _narrow(32, 1, SPLIT_STAGES, itemsize, device)
        wanted = round((1 if channels < SHARED_FROM else 2) * each * tiling.columns)
    elif channels < LONG and not (channels < SHORT and rows > NARROW_ROWS):
        tiling = _wide(WIDE_SPLIT, 1, rows, channels, itemsize, device)
        wanted = round(each * tiling.columns)
    else:
        tiling = _wide(WIDE_LONG if channels >= LONG else WIDE_SHORT, 1, rows, channels, itemsize, device)
        wanted = int(each * tiling.columns)
    return replace(tiling, parts=max(1, min(wanted, DEEPEST_SPLIT, channels // LEAST_PART)))


def _narrow(columns: int, factor: int, most: int, itemsize: int, device: torch.device) -> ProductTiling:
    """Of programs that read ``factor`` lines of weights for each of their columns, two a multiprocessor."""
    fetch = DEPTH * (NARROW_ROWS + columns * factor) * itemsize
    stages = _stages(most, shared_memory(device) // 2, fetch)
    return ProductTiling(columns, DEPTH, stages=stages, early=starts_early(device))


def _wide(
    base: ProductTiling, factor: int, rows: int, channels: int, itemsize: int, device: torch.device
) -> ProductTiling:
    """``base`` as far as ``device`` has what it takes: the tensor memory accelerator came with early launches."""
    early = starts_early(device)
    return replace(
        base,
        stages=_stages(
            base.stages,
            shared_memory(device),
            base.depth * (tile_rows(rows) + base.columns * factor) * itemsize,
        ),
        early=early,
        described=base.described and early and channels * itemsize % 16 == 0,
    )


def _stages(most: int, shared: int, fetch: int) -> int:
    """Fetches of so many bytes that are under way in so many of shared memory, ``most`` at most."""
    return max(2, min(most, (shared - RESERVED) // fetch))
