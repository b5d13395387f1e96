"""What :mod:`specattn.kernels.tail_lists` computes, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.kernels.nucleus import nucleus
from specattn.selection.base import Selection
from specattn.selection.weighted_lists import weighted_list
from specattn.selection.weighted_tail import inclusion, proposal, systematic


def tail_lists_reference(
    scores: Tensor,
    p: float,
    lengths: Tensor,
    draws: Tensor,
    shifts: Tensor,
    a: float,
    *,
    power: float = 1.0,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
) -> Selection:
    """The nucleus of ``scores`` ``[batch, ..., length]`` and a sample of the others.

    See :func:`specattn.kernels.tail_lists.tail_lists`; ``capacity`` is ``length`` or more.
    """
    exact = nucleus(scores, p, lengths, sink=sink, recent=recent)
    each = (-1, *[1] * (scores.dim() - 1))
    visible = torch.arange(scores.shape[-1], device=scores.device) < lengths.view(each)
    count = draws.view(each)[..., 0].expand(scores.shape[:-1])
    drawn, probability = systematic(inclusion(proposal(scores, visible & ~exact, a), count), shifts)
    return written(weighted_list(exact, drawn, probability**power), capacity, out)


def written(found: Selection, capacity: int, out: Selection | None) -> Selection:
    """``found`` in lists with room for ``capacity`` entries: those of ``out``, if there are any."""
    assert found.log_weights is not None
    room = (0, capacity - found.indices.shape[-1])
    indices, weights = pad(found.indices, room, value=-1), pad(found.log_weights, room)
    if out is None:
        return Selection(indices, found.counts, weights)
    assert out.log_weights is not None
    out.indices.copy_(indices)
    out.counts.copy_(found.counts)
    out.log_weights.copy_(weights)
    return out
