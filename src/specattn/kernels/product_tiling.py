"""How a product of few rows is cut into programs, and where their parts meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import multiprocessors

MOST_ROWS = 64
"""Rows up to which these kernels are faster than a library's products and what stands between them."""

LEAST_ROWS = 16
"""Rows of a tensor core's tile."""

PROGRAM_PARTS = 2 * MOST_ROWS * 64
"""Numbers that the programs of a multiprocessor leave at most: two of all rows, or four of half of them."""


@dataclass(frozen=True)
class ProductTiling:
    """How the weights are cut.

    Attributes:
        columns: outputs of a program; of a gated product as many gates and as many values.
        depth: channels that are fetched at once.
        warps, stages: of a program: its width, and how many fetches are under way.
        parts: programs that share the channels of the same outputs.
        early: start while the launch before it still runs (compute capability 9.0). That one must write no bias or
            gain: these are not waited for.
        described: tiles are fetched by Hopper's tensor memory accelerator, of lines of a multiple of 16 bytes.
    """

    columns: int
    depth: int
    warps: int = 4
    stages: int = 4
    parts: int = 1
    early: bool = False
    described: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """What every launch of such a product is told."""
        options = {"BLOCK_K": self.depth, "DESCRIBED": self.described, "EARLY": self.early}
        options |= {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"launch_pdl": True} if self.early else {})

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
        """For every product that :mod:`specattn.kernels.default_tilings` cuts."""
        most = programs(device)
        return cls(
            torch.empty(most * PROGRAM_PARTS, dtype=torch.float32, device=device),
            torch.zeros(3 * most, dtype=torch.int32, device=device),
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


def programs(device: torch.device) -> int:
    """One a multiprocessor; a few in Triton's interpreter, so that products are cut there too."""
    return multiprocessors(device, elsewhere=8)
