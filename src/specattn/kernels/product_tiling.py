"""How products of few rows are cut into programs, and where their parts meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from specattn.errors import UsageError

MOST_ROWS = 128
"""Rows up to which reading the weights is most of a product's time."""

LEAST_ROWS = 16
"""Rows of a tensor core's tile."""

NARROW = 32
"""Rows up to which one warp multiplies all of them."""

DEEPEST_SPLIT = 16
"""Parts of a row of weights, at most."""

LEAST_PART = 512
"""Channels of a part: fewer take less time than joining the parts."""

DEEPEST_PIPELINE = 6
"""Fetches under way, at most."""

PREFETCH, EARLY = False, False
"""What default tilings do of :attr:`ProductTiling.prefetch` and, where it can be, :attr:`ProductTiling.early`."""

RESERVED = 2048
"""Bytes of shared memory that CUDA keeps, and that warps exchange data in."""


@dataclass(frozen=True)
class ProductTiling:
    """How the weights are cut.

    Attributes:
        columns: outputs of a program; of a gated product as many gates and as many values.
        depth: channels that are fetched at once.
        slices: of the fetched channels, which are summed side by side; each takes 16 channels or more.
        warps, stages: of a program: its width, and how many fetches are under way.
        parts: programs that share the channels of the same outputs.
        prefetch: ask for all of a program's weights at its start, before it waits for anything.
        early: start while the launch before it still runs (compute capability 9.0).
    """

    columns: int
    depth: int
    warps: int = 4
    stages: int = 4
    parts: int = 1
    prefetch: bool = False
    early: bool = False
    slices: int = 1

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
        programs = 3 * processors(device)
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
    rows: int, outputs: int, device: torch.device, *, itemsize: int = 2, is_gated: bool = False
) -> ProductTiling:
    """For ``outputs`` that are not shared: the widest tiles that give every multiprocessor one.

    A program fetches the rows beside its weights: where they are many, narrow tiles would fetch little else.
    """
    widths: tuple[int, ...] = (64, 32)
    if tile_rows(rows) <= NARROW:  # each slice takes registers for its sums
        widths = (32, 16) if is_gated else (64, 32, 16)
    columns = next((wide for wide in widths if outputs >= wide * processors(device)), widths[-1])
    return _tiling(rows, columns, 2 if is_gated else 1, itemsize, device)


def split_tiling(
    rows: int, outputs: int, channels: int, device: torch.device, *, itemsize: int = 2
) -> ProductTiling:
    """For outputs that programs can share: tiles as wide as is good for the rows, and as many parts as give every
    multiprocessor a program, or, of many channels, two: one fetches while the other starts or ends.
    """
    tiling = _tiling(rows, min(64, max(16, tile_rows(rows) // 2)), 1, itemsize, device)
    tiles = -(-outputs // tiling.columns)
    wanted = round((1 if channels < 4 * LEAST_PART else 2) * processors(device) / tiles)
    return replace(tiling, parts=max(1, min(wanted, DEEPEST_SPLIT, channels // LEAST_PART)))


def _tiling(rows: int, columns: int, factor: int, itemsize: int, device: torch.device) -> ProductTiling:
    """Of programs that read ``factor`` lines of weights for each of their columns, two a multiprocessor."""
    block = tile_rows(rows)
    narrow = block <= NARROW
    depth = 128 if narrow else 64
    fetch = depth * (block + columns * factor) * itemsize
    stages = max(2, min(DEEPEST_PIPELINE, (_shared(device) // 2 - RESERVED) // fetch))
    return ProductTiling(
        columns,
        depth,
        warps=8 if block > 64 else 4,
        stages=stages,
        prefetch=PREFETCH and device.type == "cuda",
        early=EARLY and starts_early(device),
        slices=4 if narrow else 1,
    )


@cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on ``device`` can overlap: programmatic dependent launches came with Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; Triton's interpreter counts as few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; Triton's interpreter counts as one like an H100's."""
    if device.type != "cuda":
        return 228 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
