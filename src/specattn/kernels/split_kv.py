"""Split-KV: the tokens of a request are divided among programs, and the last to finish joins the parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import multiprocessors
from specattn.kernels.paged import PagedBatch, check_power_of_two, check_shape

LEAST_SHARE = 512
"""Tokens below which a further split costs more, in joining, than it saves."""

PROGRAMS = 4
"""Programs that run at once on a multiprocessor of an A100 or H100, as registers and shared memory allow."""

LEAST_BLOCK = 16
"""Rows of the smallest tile that tensor cores multiply."""

LARGEST_BLOCK = 128
"""Query rows times group that one program can hold."""


@dataclass(frozen=True)
class SplitWorkspace:
    """Where programs leave their parts. One serves all layers and steps of a model, but one stream at a time.

    A request's tokens go in equal shares to ``splits`` programs for each KV head. Each leaves its part of the
    result and counts itself in ``arrivals``; the one that completes the count joins the parts and sets the count
    back to 0. So there is one launch an operation and nothing to clear between launches.

    Attributes:
        outputs, lse: float32, parts of outputs and of log-sum-exps.
        arrivals: int32, all 0 between launches.
        splits: the most programs a request and KV head.
    """

    outputs: Tensor
    lse: Tensor
    arrivals: Tensor
    splits: int

    @classmethod
    def allocate(
        cls,
        *,
        batch: int,
        rows: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        length: int,
        device: torch.device | str,
        splits: int | None = None,
    ) -> SplitWorkspace:
        """Room for launches of at most ``batch`` requests, ``rows`` query rows and ``length`` tokens.

        Args:
            splits: the most programs a request and KV head; by default what keeps ``device`` busy.

        Raises:
            UsageError: see :func:`block_rows`.
        """
        pairs = batch * kv_heads
        splits = splits or choose_splits(pairs, length, torch.device(device))
        parts = pairs * splits * block_rows(rows, query_heads, kv_heads)
        return cls(
            torch.empty(parts * head_dim, dtype=torch.float32, device=device),
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.zeros(pairs, dtype=torch.int32, device=device),
            splits,
        )


def choose_splits(pairs: int, length: int, device: torch.device) -> int:
    """How many programs at most share the tokens of each of ``pairs`` requests times KV heads.

    Programs beyond those that run at once would only lengthen the joining.
    """
    return max(1, min(PROGRAMS * multiprocessors(device) // pairs, length // LEAST_SHARE))


def block_rows(rows: int, query_heads: int, kv_heads: int) -> int:
    """Rows of the tile that holds the query rows of a KV head's whole group, so that each key is read once.

    Raises:
        UsageError: if the heads do not divide into groups, or their rows do not fit in a tile.
    """
    if query_heads % kv_heads:
        raise UsageError(f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    needed = rows * (query_heads // kv_heads)
    if not 1 <= needed <= LARGEST_BLOCK:
        raise UsageError(
            f"{rows} rows of {query_heads // kv_heads} heads a group make {needed} rows: "
            f"from 1 to {LARGEST_BLOCK} fit; feed fewer rows at once"
        )
    return max(LEAST_BLOCK, 1 << (needed - 1).bit_length())


def tile_tokens(head_dim: int, dtype: torch.dtype) -> int:
    """Tokens whose keys, or values, make a tile of 16 KB: large enough to amortise a tile's reductions."""
    return max(16, min(128, 16384 // (head_dim * dtype.itemsize)))


def check_decode(query: Tensor, kv_heads: int, batch: PagedBatch, workspace: SplitWorkspace) -> int:
    """Refuse what a split-KV launch cannot do; otherwise return :func:`block_rows`.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.

    Raises:
        UsageError: shapes that do not fit together, a head dimension that is no power of two from 32 on, a
            workspace that was allocated for less.
    """
    check_shape("query", query, len(batch), None, None, None)
    _, rows, query_heads, head_dim = query.shape
    check_power_of_two("head_dim", head_dim, least=32)
    check_power_of_two("page_size", batch.page_size)
    block = block_rows(rows, query_heads, kv_heads)
    pairs = len(batch) * kv_heads
    parts = pairs * workspace.splits * block
    room = min(workspace.outputs.numel() // head_dim, workspace.lse.numel())
    if parts > room or pairs > workspace.arrivals.numel():
        raise UsageError(
            f"the workspace has room for {room} parts of {workspace.arrivals.numel()} requests times KV heads; "
            f"{parts} of {pairs} are needed: allocate it for this batch and these rows"
        )
    return block
