"""What :mod:`specattn.kernels.rate_lists` computes, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.tail_lists_reference import written
from specattn.selection.base import Selection
from specattn.selection.even_rate import drawn_at_rate


def rate_lists_reference(
    scores: Tensor,
    rate: float,
    lengths: Tensor,
    shifts: Tensor,
    a: float,
    *,
    power: float = 1.0,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
) -> Selection:
    """A sample of ``scores`` ``[batch, ..., length]`` and what is always listed.

    See :func:`specattn.kernels.rate_lists.rate_lists`; ``capacity`` is ``length`` or more.
    """
    ends = lengths.view(-1, *[1] * (scores.dim() - 1))
    position = torch.arange(scores.shape[-1], device=scores.device)
    forced = ((position < sink) | (position >= ends - recent)) & (position < ends)
    return written(drawn_at_rate(forced, scores, lengths, rate, shifts, a=a, power=power), capacity, out)
