"""How much the target's earlier scores are worth beside the draft's present ones, by their age, for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specattn.mapping.samples import EPSILON, Geometry, RoundSample, normalised

STEPS_BACK = (1, 2, 4, 8)
"""Which earlier rounds each sampled round is compared with: ages from one octave to the next."""

WEIGHTS = torch.linspace(0, 0.5, 26)
"""Weights that are tried. Above a half the divergence still falls, since most attention hardly changes, but what is new
in a round is then known only to a minority, and missed: outputs get worse than with the draft alone."""

HALF_LIVES = 2.0 ** torch.arange(3, 17)
"""Tokens, from 8 to 65,536."""


def fit_signals(
    texts: Sequence[Sequence[RoundSample]], geometry: Geometry, heads_kv: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """The weight of fresh scores and its half-life, for each layer: float32 ``[layers]`` twice.

    They minimise the mean over pairs of rounds, and over a layer's KV heads, of ``KL(target || joined)``, where joined
    is what :func:`specattn.selection.signals.joined` makes of the draft's mixture at the later round and the target's
    scores at the earlier one, under the weight ``weight * 2 ** (-age / half_life)``. The divergence is worked out on
    a grid of weights, between which it is taken to be linear: it is convex, so that this never flatters. Of weights
    that do equally well the smallest is taken.

    Args:
        texts: the rounds of each text, ascending.
        heads_kv: the draft's mixture ``[layers, kv_heads, draft heads]``.
        rows: of a round; scores of rounds that overlap say nothing.

    Returns:
        Zero weights where no text has two rounds to compare.
    """
    pairs = list(_pairs(texts, rows))
    if not pairs:
        return torch.zeros(geometry.target_layers), torch.full(
            (geometry.target_layers,), float(HALF_LIVES[0])
        )
    curves = torch.stack([_divergence(early, late, geometry, heads_kv) for early, late in pairs])
    ages = torch.tensor([_position(late) - _position(early) for early, late in pairs], device=curves.device)
    means = torch.stack(
        [
            torch.stack([_along(curves, weight * torch.exp2(-ages / half_life)) for weight in WEIGHTS])
            for half_life in HALF_LIVES
        ]
    )  # [half-lives, weights, layers]
    best = means.transpose(0, 1).flatten(0, 1).argmin(0).cpu()
    return WEIGHTS[best // len(HALF_LIVES)], HALF_LIVES[best % len(HALF_LIVES)]


def _pairs(texts: Sequence[Sequence[RoundSample]], rows: int) -> Iterator[tuple[RoundSample, RoundSample]]:
    for samples in texts:
        for number, late in enumerate(samples):
            for back in STEPS_BACK:
                if back <= number and _position(late) - _position(samples[number - back]) >= rows:
                    yield samples[number - back], late


def _position(sample: RoundSample) -> int:
    return sample.target.shape[-1]


def _divergence(early: RoundSample, late: RoundSample, geometry: Geometry, heads_kv: Tensor) -> Tensor:
    """``KL(target || joined)`` of a pair under each of :data:`WEIGHTS`, nats: ``[weights, layers]``."""
    target, known = geometry.kv_rows(late), _position(early)
    draft = heads_kv.flatten(0, 1).to(target.device) @ normalised(late.draft)
    joined = draft.clone()
    joined[:, :known] = draft[:, :known].sum(-1, keepdim=True) * geometry.kv_rows(early)
    entropy = torch.xlogy(target, target).sum(-1)
    crossed = [
        (target * (torch.lerp(draft, joined, float(weight)) + EPSILON).log()).sum(-1) for weight in WEIGHTS
    ]
    return (entropy - torch.stack(crossed)).unflatten(1, (-1, geometry.kv_heads)).mean(-1)


def _along(curves: Tensor, weights: Tensor) -> Tensor:
    """Mean over pairs of ``curves`` ``[pairs, weights, layers]`` at each pair's own weight: ``[layers]``."""
    place = weights.to(curves.device) / float(WEIGHTS[1])
    low = place.floor().long().clamp(max=len(WEIGHTS) - 2)
    pair = torch.arange(len(curves), device=curves.device)
    return torch.lerp(curves[pair, low], curves[pair, low + 1], (place - low)[:, None]).mean(0)
