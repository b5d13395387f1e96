"""The tilings that products of few rows take: what was fastest on an H200, or next to it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from specattn.kernels.device import shared_memory
from specattn.kernels.product_tiling import ProductTiling, programs, tile_rows

DEEPEST_SPLIT = 16
"""Parts of a row of weights, at most."""

LEAST_PART = 192
"""Channels of a part: fewer take less time than joining the parts."""

NARROW_ROWS = 32
"""Rows up to which tiles are narrow: each tile reads all rows again, and more of them take as long as its weights."""

DEPTH, STAGES, SHARED_STAGES = 128, 5, 4
"""For every product of Qwen2.5-0.5B at 16 rows; last, of shared outputs."""

SHARED_FROM = 5120
"""Channels from which on a product's programs are two a multiprocessor: one fetches while the other starts or ends."""

LONG, LONG_DEPTH, LONG_STAGES = 8192, 64, 6
"""Of so many channels tiles of 64 outputs are faster, fetched in halves: 11.6 us for 14.6 (Qwen2.5-1.5B, 16 rows)."""

WIDE_NORM = ProductTiling(columns=64, depth=64, stages=6, described=True, ahead=256)
WIDE_GATED = ProductTiling(columns=64, depth=64, warps=8, stages=4, described=True, ahead=256)
WIDE_SPLIT = ProductTiling(columns=64, depth=64, stages=6, described=True, ahead=256)
WIDE_LONG = ProductTiling(columns=64, depth=64, warps=8, stages=6, described=True, ahead=256)
"""Of more rows: after a norm, with a gate, and into the stream, of few channels and of many."""

RESERVED = 2048
"""Bytes of shared memory that CUDA keeps, and that warps exchange data in."""


def norm_tiling(
    rows: int, outputs: int, channels: int, device: torch.device, *, itemsize: int = 2, is_gated: bool = False
) -> ProductTiling:
    """Of a product that follows a norm.

    Narrow tiles are of 32 outputs, if they give every multiprocessor one. Gates and values are never shared.
    """
    if rows > NARROW_ROWS:
        return _wide(
            WIDE_GATED if is_gated else WIDE_NORM, rows, outputs, channels, itemsize, device, is_gated
        )
    columns = 32 if outputs >= 32 * programs(device) else 16
    return _narrow(columns, 2 if is_gated else 1, STAGES, itemsize, device)


def split_tiling(
    rows: int, outputs: int, channels: int, device: torch.device, *, itemsize: int = 2
) -> ProductTiling:
    """Of a product into the stream: as many parts as give every multiprocessor a program, or two."""
    if rows > NARROW_ROWS:
        base = WIDE_SPLIT if channels < LONG else WIDE_LONG
        return _wide(base, rows, outputs, channels, itemsize, device)
    tiling = _narrow(32, 1, SHARED_STAGES, itemsize, device)
    if channels >= LONG and tiling.stages == SHARED_STAGES:
        tiling = replace(tiling, columns=64, depth=LONG_DEPTH, stages=LONG_STAGES)
    tiles = -(-outputs // tiling.columns)
    wanted = round((1 if channels < SHARED_FROM else 2) * programs(device) / tiles)
    return replace(tiling, parts=max(1, min(wanted, DEEPEST_SPLIT, channels // LEAST_PART)))


@cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on ``device`` can overlap: programmatic dependent launches came with Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _narrow(columns: int, factor: int, most: int, itemsize: int, device: torch.device) -> ProductTiling:
    """Of programs that read ``factor`` lines of weights for each of their columns, two a multiprocessor."""
    stages = _stages(most, DEPTH, NARROW_ROWS + columns * factor, itemsize, device)
    return ProductTiling(columns, DEPTH, stages=stages, early=starts_early(device))


def _wide(
    base: ProductTiling,
    rows: int,
    outputs: int,
    channels: int,
    itemsize: int,
    device: torch.device,
    is_gated: bool = False,
) -> ProductTiling:
    """``base`` in as many parts as give every multiprocessor at most one program, of what ``device`` has for it."""
    lines = base.columns * (2 if is_gated else 1)
    parts = 1
    if not is_gated:
        tiles = -(-outputs // base.columns)
        parts = max(1, min(programs(device) // tiles, DEEPEST_SPLIT, channels // LEAST_PART))
    early = starts_early(device)
    return replace(
        base,
        stages=_stages(base.stages, base.depth, tile_rows(rows) + lines, itemsize, device),
        parts=parts,
        early=early,
        ahead=base.ahead if early else 0,
        described=base.described and early and channels * itemsize % 16 == 0,
    )


def _stages(most: int, depth: int, lines: int, itemsize: int, device: torch.device) -> int:
    """Fetches of ``lines`` that are under way in one of two programs a multiprocessor, ``most`` at most."""
    return max(2, min(most, (shared_memory(device) // 2 - RESERVED) // (depth * lines * itemsize)))
