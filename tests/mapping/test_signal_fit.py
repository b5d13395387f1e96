"""The fit of the weights of two signals, on rounds whose attention is a known mixture of draft and past."""

from __future__ import annotations

import torch
from mapping_rounds import attention
from torch import Tensor

from specattn.mapping.samples import EPSILON, Geometry, RoundSample
from specattn.mapping.signals import HALF_LIVES, WEIGHTS, fit_signals

GEOMETRY = Geometry(target_layers=3, query_heads=2, kv_heads=2, draft_layers=1, draft_heads=2)
MIXTURE = torch.eye(2).expand(3, 2, 2).contiguous()
GAP = 8


def text(fresh: Tensor, half_life: float, rounds: int = 9) -> list[RoundSample]:
    """Rounds every ``GAP`` tokens; each layer's target is ``fresh * 2 ** (-GAP / half_life)`` of the one before."""
    generator = torch.Generator().manual_seed(0)
    weight = (fresh * 0.5 ** (GAP / half_life)).repeat_interleave(2)[:, None]
    samples, before = [], None
    for number in range(rounds):
        length = 60 + GAP * number
        draft = attention(2, length, generator)
        target = draft.repeat(3, 1)
        if before is not None:
            known = before.shape[-1]
            mass = target[:, :known].sum(-1, keepdim=True)
            target[:, :known] = (1 - weight) * target[:, :known] + weight * mass * before
        samples.append(RoundSample(target, draft))
        before = target
    return samples


def divergence(samples: list[RoundSample], layer: int, fresh: float, half_life: float) -> float:
    """The mean over pairs, one, two, four and eight rounds apart, and over heads, worked out without a grid."""
    total, count = 0.0, 0
    for number, late in enumerate(samples):
        for back in (1, 2, 4, 8):
            if back > number:
                continue
            known = samples[number - back].target.shape[-1]
            age = late.target.shape[-1] - known
            w = fresh * 0.5 ** (age / half_life)
            for head in range(2):
                row, said = 2 * layer + head, late.draft[head].double()
                joined = said.clone()
                seen = samples[number - back].target[row].double()
                joined[:known] = (1 - w) * said[:known] + w * said[:known].sum() * seen
                target = late.target[row].double()
                total += float((target * (target / (joined + EPSILON)).log()).sum()) / 2
            count += 1
    return total / count


def test_the_fit_is_the_best_of_the_grid():
    samples = text(torch.tensor([0.0, 0.5, 0.9]), 32)
    weight, half_life = fit_signals([samples], GEOMETRY, MIXTURE, rows=5)
    for layer in range(3):
        found = divergence(samples, layer, float(weight[layer]), float(half_life[layer]))
        coarse = [
            divergence(samples, layer, float(w), float(h)) for w in WEIGHTS[::5] for h in HALF_LIVES[::3]
        ]
        assert found <= min(coarse) + 1e-3


def test_a_draft_that_knows_all_makes_the_past_worthless():
    weight, _ = fit_signals([text(torch.zeros(3), 32)], GEOMETRY, MIXTURE, rows=5)
    assert weight.tolist() == [0, 0, 0]


def test_more_of_the_past_gets_more_weight():
    weight, half_life = fit_signals([text(torch.tensor([0.2, 0.5, 0.9]), 1e9)], GEOMETRY, MIXTURE, rows=5)
    at_gap = weight * 0.5 ** (GAP / half_life)
    assert float(at_gap[0]) < float(at_gap[1]) < float(at_gap[2])


def test_rounds_that_overlap_and_rounds_of_other_texts_say_nothing():
    samples = text(torch.full((3,), 0.9), 1e9)
    for texts, rows in ([samples], 8 * GAP + 1), ([[sample] for sample in samples], 5):
        weight, half_life = fit_signals(texts, GEOMETRY, MIXTURE, rows)
        assert weight.tolist() == [0, 0, 0]
        assert (half_life > 0).all()
