"""Which program of :mod:`specattn.kernels.paged_attention` reads what, worked out once for all layers of a pass.

Attention over lists is cut into stretches of tiles. No stretch reaches from one list into the next, since a program
would begin again there, with all the waiting for memory that a beginning costs; and no stretch is longer than it has to
be for all of them to find a program. What follows is that the longest stretch, which a launch waits for, is as short
as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.schedule_triton import FIELDS, schedule_kernel
from specattn.kernels.tiling import Partition, Workspace


@dataclass(frozen=True)
class Schedule:
    """The stretches of one layer, or of several.

    Attributes:
        cut: the launches that it is for.
        stretches: int32 ``[..., programs, FIELDS]``: for each program its unit, -1 if it has none; the entries of the
            unit's list from which and to which it reads; the first program with a part of that unit, and how many
            have one; the unit's request and KV head.
    """

    cut: Partition
    stretches: Tensor

    def of_layer(self, layer: int) -> Schedule:
        """Those of one layer of several."""
        return Schedule(self.cut, self.stretches[layer])


def schedule(counts: Tensor, workspace: Workspace, *, listed: bool) -> Schedule:
    """Share the lists of all layers among programs, in one launch.

    Args:
        counts: int32 ``[batch, layers, kv_heads]``, entries of each list; lists may turn out shorter than that.
        workspace: of the launches, allocated for this batch.
        listed: whether lists are read, or all tokens.

    Returns:
        a schedule of ``layers`` layers.

    Raises:
        UsageError: the workspace is for another batch.
    """
    cut = workspace.listed if listed else workspace.dense
    batch, layers, kv_heads = counts.shape
    if batch * kv_heads * cut.blocks != cut.units:
        raise UsageError(
            f"{batch} x {kv_heads} lists do not fit a workspace for {cut.units // cut.blocks}: allocate one for them"
        )
    stretches = torch.empty(layers, cut.programs, FIELDS.value, dtype=torch.int32, device=counts.device)
    units = max(16, 1 << (cut.units - 1).bit_length())
    schedule_kernel[(layers,)](
        counts,
        stretches,
        cut.units,
        cut.blocks,
        kv_heads,
        cut.programs,
        *counts.stride(),
        BLOCK_N=cut.tiling.tokens,
        UNITS=units,
        num_warps=4 if units <= 1024 else 8,
    )
    return Schedule(cut, stretches)
