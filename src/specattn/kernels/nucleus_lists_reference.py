"""What :mod:`specattn.kernels.nucleus_lists` computes, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.kernels.echoes import echo_mask
from specattn.kernels.nucleus import nucleus
from specattn.selection.base import Selection

NOBODYS = 2**31 - 1
"""No token's position, where a kernel would leave what was there: to be noticed if anybody looks at it."""


def nucleus_lists_reference(
    scores: Tensor,
    p: float,
    lengths: Tensor,
    *,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
    entries: Tensor | None = None,
    also: Tensor | None = None,
    fill: bool = True,
) -> Selection:
    """The lists of the nucleus of ``scores`` ``[batch, ..., length]``; ``capacity`` must have room for all of it."""
    scores = scores if entries is None else scores[entries]
    mask = nucleus(scores, p, lengths, sink=sink, recent=recent)
    if also is not None:
        visible = torch.arange(mask.shape[-1], device=mask.device) < lengths[:, None]
        kept = echo_mask(also, mask.shape[-1]) & visible
        mask = mask | kept.view(len(kept), *[1] * (mask.dim() - 2), -1)
    found = Selection.from_mask(mask)
    indices = pad(found.indices, (0, max(0, capacity - scores.shape[-1])), value=-1)[..., :capacity]
    indices = indices if fill else indices.masked_fill(indices < 0, NOBODYS)
    if out is None:
        return Selection(indices, found.counts)
    out.indices.copy_(indices)
    out.counts.copy_(found.counts)
    return out
