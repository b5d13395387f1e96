"""A tail as large as a promise asks: each query's output is off by more than ``eps`` in at most ``delta`` of the cases.

The importance-sampling form of vAttention's bound, derived in ``docs/verified.md``. A pilot sample, drawn as the tail
will be, tells how much one draw tells about a query's output; the central limit theorem says how many draws are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.sampling import Stream
from specattn.selection.base import LayerState, Selection
from specattn.selection.budget import budget_tokens
from specattn.selection.checks import check_at_least
from specattn.selection.random import round_numbers
from specattn.selection.residual_statistics import read_logits
from specattn.selection.sampling_budget import draws_for_sum
from specattn.selection.weighted_lists import weighted_list
from specattn.selection.weighted_tail import comb_shift, inclusion, independent

LEAST = 32
"""Fewest draws, of the pilot and of the tail: the central limit theorem needs some."""
MOST_DELTA = 0.5
"""The bound by a covariance's trace is known for probabilities below 0.215, and a third of this is."""


@dataclass(frozen=True)
class Residual:
    """What a round's lists are drawn from.

    Attributes:
        exact: boolean ``[batch, layers, kv_heads, length]``, the tokens that are read with weight 1.
        weights: float64 of that shape, what the others are drawn in proportion to; its sum is 1, or 0 without others.
    """

    exact: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Promise:
    """How good the output of a query has to be.

    Attributes:
        eps, delta: the relative error that may be exceeded with probability ``delta``.
        pilot: draws that estimate the spread.
        limit: most draws of a list: a fraction of the context up to 1, a count above; 0 for no limit.
        seed: of the samples.
    """

    eps: float
    delta: float
    pilot: int
    limit: float
    seed: int

    @property
    def share(self) -> float:
        """The probability with which each may fail: the pilot, the numerator and the denominator."""
        return self.delta / 3


def check_promise(method: str, eps: float, delta: float, pilot: int) -> None:
    """Refuse a tolerance outside [0, 1), a probability for which no bound is known, and a pilot that tells nothing."""
    if not 0 <= eps < 1:
        raise UsageError(
            f"{method}: eps={eps} is outside [0, 1); use for example eps=0.1, or 0 for no promise"
        )
    if not 0 < delta <= MOST_DELTA:
        raise UsageError(f"{method}: delta={delta} is outside (0, {MOST_DELTA}]; use for example delta=0.05")
    check_at_least(method, "pilot", pilot, LEAST)


def verified_lists(state: LayerState, residual: Residual, promise: Promise) -> Selection:
    """The lists of one layer: the exact tokens, and as many others as the promise asks."""
    exact, weights = residual.exact[:, state.layer], residual.weights[:, state.layer]
    length = exact.shape[-1]
    shifts = _shifts(state, promise, promise.pilot, Stream.PILOT)
    pilot, _ = independent(promise.pilot * weights, shifts)
    spread = output_spread(state, exact, pilot, weights, promise).amax((2, 3))
    count, capped = _draws(state, promise, spread, (weights > 0).sum(-1))
    times, expected = _sample(state, promise, weights, count)
    unread = (_hits(pilot, length) > 0) & (times == 0)
    row_bytes = 2 * state.queries.shape[-1] * state.queries.element_size()
    return replace(
        weighted_list(exact, times, expected),
        extra_bytes=unread.sum((1, 2), dtype=torch.float64) * row_bytes,
        capped=capped,
    )


def output_spread(
    state: LayerState, exact: Tensor, pilot: Tensor, weights: Tensor, promise: Promise
) -> Tensor:
    """How uncertain an output would be after a single draw: its relative standard deviation, and ``eps`` times the
    denominator's; each as large as the pilot leaves possible.

    Args:
        exact: boolean ``[batch, kv_heads, length]``.
        pilot: int64 ``[batch, kv_heads, draws]``, tokens drawn in proportion to ``weights``, with repetition;
            ``length`` for none.
        weights: float64 ``[batch, kv_heads, length]``.

    Returns:
        float32 ``[batch, kv_heads, group, rows]``.
    """
    length, draws = exact.shape[-1], pilot.shape[-1]
    drawn = Selection(torch.where(pilot < length, pilot, -1).int(), (pilot < length).sum(-1).int())
    exact_logits, exact_values = read_logits(state, Selection.from_mask(exact))
    logits, values = read_logits(state, drawn)
    peak = torch.maximum(exact_logits.amax(-1), logits.amax(-1))[..., None]
    chance = weights.gather(-1, pilot.clamp(max=length - 1)).float()[:, :, None, None]
    heavy, ratios = (exact_logits - peak).exp(), (logits - peak).exp() / chance
    ratios = torch.where(torch.isfinite(logits), ratios, 0.0)

    denominator = heavy.sum(-1) + ratios.mean(-1)
    numerator = heavy @ exact_values[:, :, None] + ratios @ values[:, :, None] / draws
    output = numerator / denominator[..., None]
    # Terms w (v - o) / g of the draws: their mean's error over the denominator is the output's, to first order.
    lengths = values.square().sum(-1)[:, :, None, None]
    distance = lengths - 2 * output @ values.transpose(-1, -2)[:, :, None]
    distance = (distance + output.square().sum(-1, keepdim=True)).clamp(min=0)
    center = (ratios @ values[:, :, None] - ratios.sum(-1, keepdim=True) * output) / draws
    trace = _upper(ratios.square() * distance, promise.share) - center.square().sum(-1)
    trace = trace.clamp(min=0) * draws / (draws - 1)
    variance = _upper((ratios - ratios.mean(-1, keepdim=True)).square(), promise.share)
    scale = denominator.square()
    # The pilot's own noise lengthens the estimated output, most where the values cancel.
    size = (output.square().sum(-1) - trace / scale / draws).clamp(min=0)
    relative = torch.where(trace > 0, (trace / scale / size).sqrt(), 0.0)
    return relative + promise.eps * variance.sqrt() / denominator


def _upper(terms: Tensor, delta: float) -> Tensor:
    """The mean over the last dimension, as large as it is in all but ``delta`` of the cases."""
    quantile = NormalDist().inv_cdf(1 - delta)
    return terms.mean(-1) + quantile * terms.std(-1) / terms.shape[-1] ** 0.5


def _draws(state: LayerState, promise: Promise, spread: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[batch, kv_heads]``, and whether the limit cut them short."""
    wanted = draws_for_sum(spread, promise.eps, promise.share)
    wanted = torch.minimum(wanted.ceil().clamp(min=LEAST), others.double()).long()
    if not promise.limit:
        return wanted, torch.zeros_like(wanted, dtype=torch.bool)
    limit = budget_tokens(promise.limit, state.round.starts)[:, None]
    return torch.minimum(wanted, limit), wanted > limit


def _sample(state: LayerState, promise: Promise, weights: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """How often each token is drawn, int64 ``[batch, kv_heads, length]``, and how often on average."""
    probability = inclusion(weights, count)
    certain = probability >= 1
    most = _most_draws(promise.limit, weights.shape[-1])
    tokens, expected = independent(
        probability.masked_fill(certain, 0), _shifts(state, promise, most, Stream.TAIL)
    )
    times = _hits(tokens, weights.shape[-1])
    return torch.where(certain, 1, times), expected.masked_fill(certain, 1)


def _most_draws(limit: float, length: int) -> int:
    """A bound that the host knows."""
    if not limit:
        return length
    return min(length, math.ceil(length * limit) if limit <= 1 else int(limit))


def _hits(tokens: Tensor, length: int) -> Tensor:
    """How often each of ``length`` tokens is among ``tokens`` ``[batch, kv_heads, draws]``."""
    counts = tokens.new_zeros(*tokens.shape[:-1], length + 1)
    return counts.scatter_add_(-1, tokens, torch.ones_like(tokens))[..., :length]


def _shifts(state: LayerState, promise: Promise, draws: int, stream: Stream) -> Tensor:
    """int64 ``[batch, kv_heads, draws]``."""
    heads = state.round.kv_heads
    lists = torch.arange(state.layer * heads, (state.layer + 1) * heads, device=state.queries.device)
    numbers = round_numbers(state.round.starts, promise.seed, lists, 2 * draws, stream)
    return comb_shift(numbers.unflatten(-1, (draws, 2)))
