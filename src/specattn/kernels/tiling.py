"""How a launch of :mod:`specattn.kernels.paged_attention` is cut into tiles and programs, and what room it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specattn.kernels.device import multiprocessors, shared_memory

LEAST_ROWS = 16  # of a tile that tensor cores multiply
MOST_ROWS = 128  # of queries with up to 128 channels that the registers of a program hold
WIDE_ROWS = 64  # more than these need eight warps
LEAN_ROWS = 32  # no more than these leave two warps registers
PART_ELEMENTS = 64  # of parts that a thread can read at once, when they are combined
MOST_PARTS = 8  # that are read at once
DEEPEST = 4  # stages; what more of them could hide is hidden by the other program of the multiprocessor


@dataclass(frozen=True)
class Tiling:
    """What can be tuned; nothing here changes a result beyond rounding.

    Attributes:
        tokens: keys and values a tile, a power of two from 16 on.
        warps: of a program.
        stages: one more than the tiles that are fetched ahead.
        programs: on each multiprocessor at a time.
        rows: least query rows of a tile, a power of two from 16 on. 64 makes Hopper use its warpgroup instructions.
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 4
    programs: int = 2
    rows: int = LEAST_ROWS


@dataclass(frozen=True)
class Partition:
    """A launch in numbers.

    Attributes:
        units: lists times ``blocks``.
        blocks: tiles that the query rows of a list fill.
        programs: how many divide the units' tiles among them, at most; each leaves one part of a unit.
        block_m, block_d: query rows and channels of a tile, powers of two.
    """

    tiling: Tiling
    units: int
    blocks: int
    programs: int
    block_m: int
    block_d: int

    @property
    def part_size(self) -> int:
        """float32 elements of a part: its outputs and its log-sums."""
        return self.block_m * (self.block_d + 1)

    @property
    def parts_at_once(self) -> int:
        """Parts of a list whose loads do not wait for each other, as registers allow."""
        room = PART_ELEMENTS * 32 * self.tiling.warps
        return max(1, min(MOST_PARTS, room // (self.block_m * self.block_d)))


@dataclass(frozen=True)
class Workspace:
    """How launches of one batch are cut, and where programs leave their parts of a list.

    One serves all layers of a model, but one stream at a time. A program that has written its part of a unit counts
    itself in ``arrivals``; the one that completes the count combines the parts and sets the count back to 0. So there
    is one launch an operation and nothing to clear between launches.

    Attributes:
        listed, dense: the cuts of launches over lists, and over all tokens.
        parts: float32, of any content.
        arrivals: int32, one for each unit, all 0 between launches.
    """

    listed: Partition
    dense: Partition
    parts: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls,
        *,
        batch: int,
        rows: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        tiling: Tiling | None = None,
    ) -> Workspace:
        """For launches of these shapes, and of fewer rows."""
        device = torch.device(device)
        shape = (batch, rows, query_heads, kv_heads, head_dim, dtype, device, tiling)
        listed, dense = cuts = [partition(*shape, listed=listed) for listed in (True, False)]
        return cls(
            listed,
            dense,
            torch.empty(
                max(cut.programs * cut.part_size for cut in cuts), dtype=torch.float32, device=device
            ),
            torch.zeros(max(cut.units for cut in cuts), dtype=torch.int32, device=device),
        )

    def views(self, cut: Partition) -> tuple[Tensor, Tensor]:
        """Partial outputs and their log-sums of launches with this cut."""
        rows = cut.programs * cut.block_m
        partials, lses = self.parts[: cut.programs * cut.part_size].split([rows * cut.block_d, rows])
        return partials, lses


def partition(
    batch: int,
    rows: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    tiling: Tiling | None = None,
    *,
    listed: bool,
) -> Partition:
    """Cut attention of ``rows`` query rows a request; ``tiling`` is by default what suits lists, or all tokens."""
    block_d = max(LEAST_ROWS, _power_of_two(head_dim))
    needed = rows * (query_heads // kv_heads)
    least = tiling.rows if tiling else LEAST_ROWS
    most = max(LEAST_ROWS, MOST_ROWS * 128 // max(block_d, 128))
    block_m = min(max(least, _power_of_two(needed)), most)
    processors, shared = multiprocessors(device), shared_memory(device)
    blocks = -(-needed // block_m)
    units = batch * kv_heads * blocks
    if tiling is None:
        tiling = default_tiling(block_m, block_d, dtype.itemsize, shared)
        tiling = list_tiling(tiling, units, block_d, dtype.itemsize, processors, shared) if listed else tiling
    programs = max(processors * tiling.programs, units)
    return Partition(tiling, units, blocks, programs, block_m, block_d)


def default_tiling(block_m: int, block_d: int, itemsize: int, shared: int) -> Tiling:
    """The deepest pipeline of the largest tiles that fits into ``shared`` bytes of a multiprocessor.

    Two programs a multiprocessor: one computes while the other waits. There is one, of twice the warps, where many
    query rows take most of the registers. Tiles are halved rather than fetched one at a time.
    """
    wide = block_m * max(block_d, 128) > WIDE_ROWS * 128
    warps, programs = (8, 1) if wide else (4, 2)
    tokens = 64
    while True:
        tile = 2 * tokens * block_d * itemsize
        # Queries and weights of a tile lie beside the keys and values. CUDA keeps a kilobyte of each program, and what
        # else is exchanged there takes less than another.
        room = shared // programs - 2048 - block_m * (block_d + tokens) * itemsize
        stages = min(DEEPEST, room // tile + (1 if block_m < 64 else 0))
        if stages >= 3 or tokens == LEAST_ROWS:
            return Tiling(tokens, warps, max(stages, 2), programs, block_m)
        tokens //= 2


def list_tiling(
    tiling: Tiling, units: int, block_d: int, itemsize: int, processors: int, shared: int
) -> Tiling:
    """What read lists of a twentieth and a tenth of 32K tokens fastest on an H200, from what suits all tokens.

    Lists are short: a program has a few tiles, and waiting for the first of them is most of its time. Where the rows
    leave registers, small programs, more of them at a time, hide that; where few units are shared by many programs, one
    or two large ones a multiprocessor leave fewer parts to combine.
    """
    if tiling.warps > 4:
        return tiling
    narrow = block_d <= 64
    lean = replace(tiling, stages=min(tiling.stages, 3), programs=3 if narrow else tiling.programs)
    large = replace(lean, tokens=128, programs=2 if narrow else 1)
    if units * 4 <= processors and _fits(large, block_d, itemsize, shared - 16384):
        return large
    small = replace(lean, tokens=64 if narrow else 32, warps=2, programs=4)
    if tiling.rows <= LEAN_ROWS and _fits(small, block_d, itemsize, shared - 16384):
        return small
    return lean


def _fits(tiling: Tiling, block_d: int, itemsize: int, room: int) -> bool:
    """Whether all tiles that are under way at a time fit into ``room`` bytes."""
    return 2 * tiling.tokens * block_d * itemsize * tiling.stages * tiling.programs <= room


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
