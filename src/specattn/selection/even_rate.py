"""Lists that are drawn in proportion to the draft's attention, at one rate in all heads, instead of cut at a mass.

A token with the predicted attention ``w`` is read with probability ``min(1, rate * length * w)``. So all heads stop
where a further read is worth the same: heads whose attention lies on few tokens read little more than these, and flat
ones read a fair sample. See ``docs/methods/specattn.md`` for why these probabilities vary least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.sampling import Stream
from specattn.selection.base import RoundState, Selection
from specattn.selection.checks import check_probability
from specattn.selection.random import random_weights
from specattn.selection.weighted_lists import weighted_list
from specattn.selection.weighted_tail import comb_shift, for_kv_heads, proposal, systematic


def check_rate(method: str, rate: float, *, replaced: bool) -> None:
    """Refuse a rate that is no positive number, and what would be drawn beside it."""
    if not 0 <= rate < math.inf:
        raise UsageError(
            f"{method}: rate={rate} is no share of the context; use for example rate=0.2, or 0 for none"
        )
    if rate and replaced:
        raise UsageError(
            f"{method}: rate={rate} draws what tail, eps, centroids and granularity=page would add; leave these out"
        )


def check_power(method: str, power: float, *, promised: bool) -> None:
    """Refuse an exponent outside (0, 1], and weights with a bias where a promise needs them without."""
    check_probability(method, "power", power, example=0.8)
    if promised and power != 1:
        raise UsageError(f"{method}: power={power} shrinks weights that eps needs unbiased; use power=1")


def even_rate_lists(
    state: RoundState,
    forced: Tensor,
    density: Tensor,
    rate: float,
    *,
    a: float,
    power: float,
    seed: int,
) -> Selection:
    """The lists of a round: the tokens of ``forced``, and a sample of the others that the round can see.

    Args:
        forced: boolean ``[batch, 1, 1, length]``, tokens that are always read.
        density: ``[batch, layers, heads, length]``, as for :func:`specattn.selection.weighted_tail.add_tail`.
        rate: the share of the context that a head with flat attention reads; others read less.
        a: the uniform share, in (0, 1].
        power: a drawn token's weight is its probability to the power of ``-power``; 1 has no bias.
    """
    shifts = comb_shift(random_weights(state, seed, 2, Stream.TAIL))
    density = for_kv_heads(density, state.kv_heads)
    return drawn_at_rate(forced, density, state.lengths, rate, shifts, a=a, power=power)


def drawn_at_rate(
    forced: Tensor, density: Tensor, lengths: Tensor, rate: float, shifts: Tensor, *, a: float, power: float
) -> Selection:
    """The same with the comb of each list, int64 ``shifts`` ``[batch, ...]``; ``density`` is ``[batch, ..., length]``.

    ``lengths`` ``[batch]`` is what a round can see.
    """
    ends = lengths.view(-1, *[1] * (density.dim() - 1))
    visible = torch.arange(density.shape[-1], device=density.device) < ends
    chance = (rate * ends * proposal(density, visible, a)).clamp(max=1)
    drawn, probability = systematic(torch.where(forced, 0.0, chance), shifts)
    return weighted_list(forced.expand_as(drawn), drawn, probability**power)
