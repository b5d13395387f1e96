"""A sample of what the nucleus leaves out, in proportion to the draft's attention, that stands for all of it.

Softmax's numerator and denominator are sums over the context. The nucleus gives its part exactly; the rest is estimated
as Horvitz and Thompson (1952) do: a token that is drawn with probability ``pi`` counts ``1 / pi`` times, which is a
log-weight of ``-log pi`` on its logit. The closer ``pi`` comes to a token's true attention, the less the estimate
varies; a share of uniform probability bounds the weights where the draft is wrong.

Tokens are drawn systematically (Madow 1949): their probabilities lie side by side on a line in the order of positions,
and every token is drawn that a comb with teeth at distance 1, shifted at random, hits. No token is drawn twice, the
probabilities are met exactly, and every stretch of the text gets its share of draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.sampling import Stream
from specattn.selection.base import RoundState, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_probability
from specattn.selection.random import random_weights
from specattn.selection.weighted_lists import weighted_list

UNIT_BITS = 40
"""Probabilities are multiples of 2**-40: integers add up exactly, and 2**22 of them fit into an int64."""
UNIT = 1 << UNIT_BITS


def check_tail(method: str, tail: float, a: float) -> None:
    """Refuse a tail that is neither off, nor a fraction, nor a count, and a uniform share outside (0, 1]."""
    if tail != 0:
        check_budget(method, tail, "tail")
    check_probability(method, "a", a, example=0.2)


def add_tail(
    state: RoundState, exact: Tensor, density: Tensor, tail: float, a: float, seed: int, power: float = 1.0
) -> Selection:
    """The lists of a round: the tokens of ``exact``, and a sample of the others that the round can see.

    Args:
        exact: boolean ``[batch, layers, kv_heads, length]``, the round's own tokens among them.
        density: ``[batch, layers, heads, length]``, the attention that the draft predicts; ``heads`` are one for all,
            the KV heads, or query heads, whose groups are averaged.
        tail: tokens to draw for each list: a fraction of the context up to 1, a count above.
        a: the uniform share, in (0, 1].
        power: a drawn token's weight is its probability to the power of ``-power``; 1 has no bias.
    """
    weights = residual_weights(state, exact, density, a)
    count = budget_tokens(tail, state.starts)[:, None, None]
    return with_tail(exact, weights, count, random_weights(state, seed, 2, Stream.TAIL), power)


def residual_weights(state: RoundState, exact: Tensor, density: Tensor, a: float) -> Tensor:
    """What the tokens outside of ``exact`` are drawn in proportion to, of the shape of ``exact``."""
    position = torch.arange(exact.shape[-1], device=exact.device)
    visible = position < state.lengths[:, None, None, None]
    return proposal(for_kv_heads(density, state.kv_heads), visible & ~exact, a)


def for_kv_heads(density: Tensor, kv_heads: int) -> Tensor:
    """``[batch, layers, kv_heads, length]`` of a density for one head, for KV heads or for query heads."""
    if density.shape[2] == 1:
        return density.expand(-1, -1, kv_heads, -1)
    return density.unflatten(2, (kv_heads, -1)).mean(3)


def proposal(density: Tensor, residual: Tensor, a: float) -> Tensor:
    """What the residual is drawn in proportion to: the draft's attention, mixed with a uniform share.

    Args:
        density: ``[..., length]``, the attention that the draft predicts; need not be normalised. What is not finite,
            or negative, counts as 0.
        residual: boolean ``[..., length]``, the tokens that may be drawn.
        a: the uniform share, in (0, 1].

    Returns:
        float64 ``[..., length]``, above 0 for the tokens of the residual, whose sum is 1; 0 elsewhere.
    """
    density = density.double().nan_to_num(0, 0, 0).clamp(min=0)
    density = torch.where(residual, density, 0.0)
    mass = density.sum(-1, keepdim=True)
    even = residual / residual.sum(-1, keepdim=True).clamp(min=1).double()
    return torch.where(mass > 0, (1 - a) * density / mass, (1 - a) * even) + a * even


def inclusion(weights: Tensor, count: Tensor) -> Tensor:
    """Probabilities in proportion to ``weights``, at most 1, whose sum is ``count``.

    Where the proportion asks for more than 1 the token is certain, and the others share what is left, until none asks
    for more than 1. All tokens with a weight are certain once there are no more than ``count``.

    Args:
        weights: float64 ``[..., length]``, not negative.
        count: integer ``[...]``.
    """
    count = count[..., None]
    heaviest = weights.sort(-1, descending=True).values
    others = heaviest.flip(-1).cumsum(-1).flip(-1)  # the weight from each place on
    place = torch.arange(weights.shape[-1], device=weights.device)
    # With the tokens before a place certain, does the one there ask for more than 1? If not, none behind it does.
    certain = ((count - place) * heaviest > others).sum(-1, keepdim=True)
    left = others.gather(-1, certain.clamp(max=weights.shape[-1] - 1))
    scale = (count - certain) / left.clamp(min=torch.finfo(torch.float64).tiny)
    some = weights > 0
    probability = torch.where(some, (scale * weights).clamp(max=1.0), 0.0)
    return torch.where(some.sum(-1, keepdim=True) <= count, some.double(), probability)


def systematic(probability: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Draw each token with its probability, at most once.

    Args:
        probability: float64 ``[..., length]``, in [0, 1]. Read as a multiple of 2**-40, rounded down, but not to 0.
        shift: int64 ``[...]``, uniform in [0, 2**40): where the comb's teeth are.

    Returns:
        int32 ``[..., length]``, 1 where a token was drawn, and float64 of that shape: with which probability it was.
        As many are drawn as the probabilities' sum, or one less where it was rounded down.
    """
    width = (probability * UNIT).long()
    width = torch.where(probability > 0, width.clamp(min=1), 0)
    end = width.cumsum(-1) + (UNIT - 1 - shift)[..., None]
    drawn = (end >> UNIT_BITS) - ((end - width) >> UNIT_BITS)
    return drawn.int(), width.double() / UNIT


def independent(probability: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens the teeth of a comb hit whose teeth are shifted each on its own, in order.

    No arrangement of the text is in step with such a comb, and the draws are independent, as the central limit theorem
    wants them. A token that lies across the end of a unit may be hit twice, or more often if it is longer than one.

    Args:
        probability: float64 ``[..., length]``, how often each token is drawn on average.
        shifts: int64 ``[..., draws]``, uniform in [0, 2**40).

    Returns:
        int64 ``[..., draws]``, ``length`` for a tooth behind the last token; and float64 ``[..., length]``: what
        ``probability`` is as a multiple of 2**-40.
    """
    width = (probability * UNIT).long()
    tooth = torch.arange(shifts.shape[-1], device=shifts.device) * UNIT + shifts
    return torch.searchsorted(width.cumsum(-1), tooth, right=True), width.double() / UNIT


def comb_shift(numbers: Tensor) -> Tensor:
    """int64 ``[...]`` uniform in [0, 2**40) from two random numbers of 24 bits ``[..., 2]``."""
    high, low = (numbers.double() * 2**24).long().unbind(-1)
    return (high << (UNIT_BITS - 24)) | (low >> (48 - UNIT_BITS))


def with_tail(
    exact: Tensor, weights: Tensor, count: Tensor, numbers: Tensor, power: float = 1.0
) -> Selection:
    """The tokens of ``exact`` and ``count`` others, drawn with probabilities in proportion to ``weights``.

    Args:
        exact: boolean ``[..., length]``; read with weight 1.
        weights: float64 ``[..., length]``, of :func:`proposal`; 0 for the tokens of ``exact``.
        count: integer ``[...]``; all others if there are no more.
        numbers: uniform in [0, 1), ``[..., 2]``.
        power: of the weights, see :func:`add_tail`.
    """
    drawn, probability = systematic(inclusion(weights, count), comb_shift(numbers))
    return weighted_list(exact, drawn, probability**power)
