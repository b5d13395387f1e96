"""From scores to lists that are drawn at one rate, with their log-weights, in one launch on a GPU."""

from __future__ import annotations

import math

from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus_lists import widened
from specattn.kernels.rate_triton import rate_kernel
from specattn.kernels.tail_lists import room_for_draws
from specattn.selection.base import Selection

TILE = 1024
WARPS = 4
"""So that three programs share a multiprocessor, whose sums over the tile wait for each other."""


def rate_lists(
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
    tile: int = TILE,
) -> Selection:
    """The sample of :func:`specattn.selection.even_rate.drawn_at_rate`, its probabilities computed in float32.

    Args:
        scores, lengths, sink, recent: as in :func:`specattn.kernels.nucleus_lists.nucleus_lists`; what is not finite,
            or negative, counts as 0.
        rate: the share of its tokens that a row with even scores lists, above 0.
        shifts, a, power, capacity, out: as in :func:`specattn.kernels.tail_lists.tail_lists`.
        tile: tokens that are read at a time.

    Raises:
        UsageError: an argument is not as described.
    """
    if not 0 < rate < math.inf:
        raise UsageError(f"rate = {rate} is not a share of the tokens: give a number above 0")
    out, weights = room_for_draws(scores, lengths, shifts, a, power, capacity, sink, recent, out)
    scores, lengths = widened(scores, lengths)
    if shifts.numel():
        flat = scores.view(scores.shape[0], -1, scores.shape[-1])
        rate_kernel[(shifts.numel(),)](
            flat,
            lengths,
            shifts,
            out.indices,
            weights,
            out.counts,
            *flat.stride()[:2],
            flat.shape[1],
            flat.shape[2],
            capacity,
            sink,
            recent,
            float(rate),
            float(a),
            float(power),
            TILE=tile,
            num_warps=WARPS,
        )
    return out
