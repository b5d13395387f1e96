"""Top-p (nucleus) and top-k masks without a sort: the threshold is found in the bits of the floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.errors import UsageError

DIGIT_BITS = 8
DIGITS = 4  # 4 x 8 bits cover an int32 key
BINS = 1 << DIGIT_BITS

HIDDEN = -1  # below every key of a weight, and without mass
FORCED = 2**31 - 1  # above every key of a weight
INFINITE = 0x7F800000  # the bits of +inf


def nucleus(weights: Tensor, p: float | Tensor, lengths: Tensor, *, sink: int = 0, recent: int = 0) -> Tensor:
    """The smallest set of positions that holds ``p`` of each row's mass (top-p; Holtzman et al. 2020).

    Forced positions are always in the set, and their mass counts. The set is minimal under ties too: of equal
    weights at the threshold only as many are kept as are needed, the most recent (highest) positions first.
    Zero weights are never needed. With ``p >= 1``, and in a row whose mass is zero, infinite or NaN,
    everything visible is kept. Sums and the comparison with ``p * total`` are float64, and exact up to that.

    Args:
        weights: ``[batch, ..., length]``, non-negative (a negative weight counts as 0), read as float32. What
            lies beyond the visible positions does not matter, NaN included.
        p: fraction of the mass, above 0, or a tensor of fractions broadcastable to ``weights.shape[:-1]``.
        lengths: int ``[batch]``, how many positions are visible.
        sink: the first positions of each row, forced.
        recent: the last visible positions of each row, forced.

    Returns:
        bool mask of the shape of ``weights``.

    Raises:
        UsageError: ``p`` is a number not above 0, or ``lengths`` does not match ``weights``.
    """
    if not isinstance(p, Tensor) and not p > 0:
        raise UsageError(f"p = {p} is not a fraction of the mass: give a number in (0, 1]")
    visible, forced = _regions(weights, lengths, sink, recent)
    fraction = _per_row(p, weights)
    mass = torch.where(visible, weights.float(), 0).clamp(min=0).double()
    total = mass.sum(-1, keepdim=True)
    needed = (fraction * total).clamp(min=torch.finfo(torch.float64).tiny)  # so that no row is left empty
    # Zeros are hidden, so that rounding cannot ask for them when p is all but 1.
    kept = _heaviest(_keys(weights, mass > 0, forced), mass, needed)
    everything = ~(fraction < 1) | ~(total > 0) | ~total.isfinite()
    return kept | (visible & everything)


def top_k(weights: Tensor, k: int | Tensor, lengths: Tensor, *, sink: int = 0, recent: int = 0) -> Tensor:
    """The ``k`` heaviest visible positions of each row, forced ones included: a mask like ``nucleus``'s.

    Exactly ``min(max(k, forced), visible)`` positions are kept in each row: zero weights count like others,
    ties go to the most recent positions, and NaN ranks with infinity. ``k`` may be a tensor broadcastable to
    ``weights.shape[:-1]``; the other arguments are those of ``nucleus``.

    Raises:
        UsageError: ``k`` is a negative number, or ``lengths`` does not match ``weights``.
    """
    if not isinstance(k, Tensor) and k < 0:
        raise UsageError(f"k = {k} is negative: give the number of positions to keep, 0 or more")
    visible, forced = _regions(weights, lengths, sink, recent)
    return _heaviest(_keys(weights, visible, forced), visible.double(), _per_row(k, weights))


def _regions(weights: Tensor, lengths: Tensor, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """Masks of the visible and of the forced positions, of the shape of ``weights``."""
    if lengths.shape != weights.shape[:1]:
        got, shape = list(lengths.shape), list(weights.shape)
        raise UsageError(f"lengths has shape {got}: weights {shape} need {shape[:1]}, one a batch entry")
    ends = lengths.reshape(-1, *[1] * (weights.dim() - 1))
    position = torch.arange(weights.shape[-1], device=weights.device)
    visible = (position < ends).expand_as(weights)
    return visible, visible & ((position < sink) | (position >= ends - recent))


def _per_row(value: float | Tensor, weights: Tensor) -> Tensor:
    """``value`` as float64 ``[..., 1]``, one for each row; a plain number is filled in on the device."""
    rows = weights.shape[:-1]
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float64, device=weights.device)
    return value.double().broadcast_to(rows).unsqueeze(-1)


def _keys(weights: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
    """int32 keys in the order of the weights: non-negative floats sort like their bits read as integers."""
    bits = weights.float().view(torch.int32).clamp(min=0)  # -0.0 and negative weights become 0
    bits = torch.where(weights.isnan(), INFINITE, bits)
    return torch.where(forced, FORCED, torch.where(candidates, bits, HIDDEN))


def _heaviest(keys: Tensor, mass: Tensor, needed: Tensor) -> Tensor:
    """Mask of the forced keys and of as many of the highest others as bring the mass to ``needed``."""
    threshold = _threshold(keys, mass, needed)
    forced = keys == FORCED
    above = (keys > threshold) | forced
    tied = (keys == threshold) & ~forced
    missing = needed - torch.where(above, mass, 0).sum(-1, keepdim=True)
    each = torch.where(tied, mass, 0).amax(-1, keepdim=True)
    rank = tied.cumsum(-1)
    later = rank[..., -1:] - rank  # how many of the tied positions are more recent
    return above | (tied & (later < (missing / each).ceil()))


def _threshold(keys: Tensor, mass: Tensor, needed: Tensor) -> Tensor:
    """The largest key ``[..., 1]`` such that the keys from there up have the mass ``needed`` ``[..., 1]``.

    A radix select: a histogram of the mass over the keys' next digit, among the keys that share the digits
    found so far, tells the digit in which the mass reaches ``needed``. Four passes, whatever the weights.
    """
    prefix = torch.zeros_like(needed, dtype=torch.int32)
    for shift in reversed(range(0, DIGITS * DIGIT_BITS, DIGIT_BITS)):
        digits = keys >> shift
        active = torch.where(digits >> DIGIT_BITS == prefix, mass, 0)
        histogram = mass.new_zeros(*keys.shape[:-1], BINS)
        histogram.scatter_add_(-1, (digits & (BINS - 1)).long(), active)
        reached = histogram.flip(-1).cumsum(-1)  # mass from the highest digit down
        # Rounding, or too little mass, may leave `needed` out of reach: then all of it is taken.
        higher = (reached < torch.minimum(needed, reached[..., -1:])).sum(-1, keepdim=True)
        needed = needed - pad(reached, (1, 0)).gather(-1, higher)
        prefix = prefix << DIGIT_BITS | (BINS - 1 - higher).int()
    return prefix & FORCED  # all ones where nothing is needed: above every weight
