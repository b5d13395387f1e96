"""How products of few rows are cut into programs, and where their parts meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import multiprocessors, shared_memory

MOST_ROWS = 128
"""Rows up to which these kernels are faster than a library's products and what stands between them."""

LEAST_ROWS = 16
"""Rows of a tensor core's tile."""

DEEPEST_SPLIT = 16
"""Parts of a row of weights, at most."""

LEAST_PART = 192
"""Channels of a part: fewer take less time than joining the parts."""

DEPTH, STAGES, SHARED_STAGES = 128, 5, 4
"""What was fastest on an H200, or next to it, for every product of Qwen2.5-0.5B at 16 rows; last, of shared outputs."""

SHARED_FROM = 5120
"""Channels from which on a product's programs are two a multiprocessor: one fetches while the other starts or ends."""

LONG, LONG_DEPTH, LONG_STAGES = 8192, 64, 6
"""Of so many channels tiles of 64 outputs are faster, fetched in halves: 11.6 us for 14.6 (Qwen2.5-1.5B, 16 rows)."""

RESERVED = 2048
"""Bytes of shared memory that CUDA keeps, and that warps exchange data in."""


@dataclass(frozen=True)
class ProductTiling:
    """How the weights are cut.

    Attributes:
        columns: outputs of a program; of a gated product as many gates and as many values.
        depth: channels that are fetched at once.
        warps, stages: of a program: its width, and how many fetches are under way.
        parts: programs that share the channels of the same outputs.
        early: start while the launch before it still runs (compute capability 9.0).
        ahead: channels, a power of 2, that an early launch asks for while it waits.
        described: tiles are fetched by Hopper's tensor memory accelerator, of lines of a multiple of 16 bytes.
        swapped: weights are what the tensor cores have rows of, and rows are their columns.
    """

    columns: int
    depth: int
    warps: int = 4
    stages: int = 4
    parts: int = 1
    early: bool = False
    ahead: int = 0
    described: bool = False
    swapped: bool = False

    def cut(self, channels: int) -> tuple[int, int]:
        """Programs that share ``channels``, none without any, and the fetches of each."""
        fetches = -(-channels // self.depth)
        steps = -(-fetches // min(self.parts, fetches))
        return -(-fetches // steps), steps


@dataclass(frozen=True)
class ProductWorkspace:
    """Where programs that share outputs leave their parts; launches of one stream can share it.

    Attributes:
        parts: float32.
        arrivals: int32, zeros between launches.
    """

    parts: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, device: torch.device) -> ProductWorkspace:
        """For every product that :func:`split_tiling` cuts."""
        programs = 3 * _programs(device)
        return cls(
            torch.empty(programs * MOST_ROWS * 64, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
        )

    def check(self, tiles: int, parts: int, size: int) -> None:
        """Whether ``parts`` of ``size`` numbers fit, of each of ``tiles``.

        Raises:
            UsageError: they do not.
        """
        if self.parts.numel() < tiles * parts * size or self.arrivals.numel() < tiles:
            raise UsageError(
                f"a workspace of {self.parts.numel()} elements for {self.arrivals.numel()} tiles is too small: "
                f"{tiles * parts * size} for {tiles} are needed; take a tiling of fewer parts"
            )


def shared_tiles(
    workspace: ProductWorkspace | None, tiles: int, parts: int, size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Where ``parts`` of ``size`` numbers of each tile are left, and where they are counted; nothing if there is one.

    Raises:
        UsageError: they do not fit.
    """
    if parts == 1:
        return None, None
    workspace = workspace or ProductWorkspace.allocate(device)
    workspace.check(tiles, parts, size)
    return workspace.parts, workspace.arrivals


def check_contiguous(*tensors: Tensor | None) -> None:
    """Raise a :class:`UsageError` unless all tensors that are given lie in memory row by row."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise UsageError(
                f"a tensor of shape {list(tensor.shape)} has strides {tensor.stride()}: it must be contiguous"
            )


def tile_rows(rows: int) -> int:
    """Rows of a tile that holds all.

    Raises:
        UsageError: there are too many.
    """
    if rows > MOST_ROWS:
        raise UsageError(f"a product of {rows} rows is not for these kernels: they take up to {MOST_ROWS}")
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def norm_tiling(
    outputs: int, device: torch.device, *, itemsize: int = 2, is_gated: bool = False
) -> ProductTiling:
    """For ``outputs`` that are not shared: tiles of 32, if they give every multiprocessor one."""
    columns = 32 if outputs >= 32 * _programs(device) else 16
    return _tiling(columns, 2 if is_gated else 1, STAGES, itemsize, device)


def split_tiling(outputs: int, channels: int, device: torch.device, *, itemsize: int = 2) -> ProductTiling:
    """For outputs that programs can share: as many parts as give every multiprocessor a program, or two."""
    tiling = _tiling(32, 1, SHARED_STAGES, itemsize, device)
    if channels >= LONG and tiling.stages == SHARED_STAGES:
        tiling = replace(tiling, columns=64, depth=LONG_DEPTH, stages=LONG_STAGES)
    tiles = -(-outputs // tiling.columns)
    wanted = round((1 if channels < SHARED_FROM else 2) * _programs(device) / tiles)
    return replace(tiling, parts=max(1, min(wanted, DEEPEST_SPLIT, channels // LEAST_PART)))


def _tiling(columns: int, factor: int, most: int, itemsize: int, device: torch.device) -> ProductTiling:
    """Of programs that read ``factor`` lines of weights for each of their columns, two a multiprocessor."""
    fetch = DEPTH * (MOST_ROWS + columns * factor) * itemsize
    stages = max(2, min(most, (shared_memory(device) // 2 - RESERVED) // fetch))
    return ProductTiling(columns, DEPTH, stages=stages, early=starts_early(device))


@cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on ``device`` can overlap: programmatic dependent launches came with Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _programs(device: torch.device) -> int:
    """One a multiprocessor; a few in Triton's interpreter, so that products are cut there too."""
    return multiprocessors(device, elsewhere=8)
