"""Both signals joined, against a plain reading: token by token, request by request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_matrix import GROUPS, LAYER, LAYERS, LENGTHS, ROWS, make, prepared, stored_scores
from tiny import random_mapping

from specattn.errors import UsageError
from specattn.mapping.samples import Geometry
from specattn.selection.base import RoundState
from specattn.selection.registry import parse_method
from specattn.selection.signals import HALF_LIFE, WEIGHT, joined, signal_weight
from specattn.target_scores import StoredScores

MAPPING = random_mapping(Geometry(LAYERS, 6, 2, 2, 4))
POSITIONS, STARTS, LENGTH = [0, 5, 20], [12, 9, 26], 29


def a_state() -> RoundState:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.zeros(3, LAYERS, 2, 24, dtype=torch.bfloat16)
    for request, position in enumerate(POSITIONS):
        drawn = torch.rand(LAYERS, 2, position, generator=generator)
        probabilities[request, ..., :position] = drawn / drawn.sum(-1, keepdim=True)
    positions = torch.tensor(POSITIONS, dtype=torch.int32)
    scores = StoredScores(probabilities, positions, positions, torch.zeros(3).bool())
    starts = torch.tensor(STARTS, dtype=torch.int32)
    return RoundState(starts, ROWS, LENGTH, LAYERS, 2, 6, mapping=MAPPING, scores=scores)


def test_the_weight_halves_with_age():
    weight = signal_weight(MAPPING, torch.tensor([0, 7, 1000]))
    for layer in range(LAYERS):
        fresh, half_life = float(MAPPING.signal_weight[layer]), float(MAPPING.signal_half_life[layer])
        for place, age in enumerate((0, 7, 1000)):
            assert float(weight[place, layer]) == pytest.approx(fresh * 0.5 ** (age / half_life), rel=1e-5)


def test_a_mapping_without_weights_has_the_documented_ones():
    old = replace(MAPPING, signal_weight=None, signal_half_life=None)
    weight = signal_weight(old, torch.tensor([0, int(HALF_LIFE)]))
    assert weight.tolist() == [[WEIGHT] * LAYERS, [WEIGHT / 2] * LAYERS]


def test_known_tokens_are_mixed_and_newer_ones_are_the_drafts():
    state = a_state()
    draft = torch.rand(3, 2, LAYERS, 2, LENGTH, generator=torch.Generator().manual_seed(1))
    draft = draft / draft.sum(-1, keepdim=True)
    found = joined(draft, state)
    for request, position in enumerate(POSITIONS):
        for layer in range(LAYERS):
            age = STARTS[request] - position
            w = float(MAPPING.signal_weight[layer]) * 0.5 ** (age / float(MAPPING.signal_half_life[layer]))
            for head in range(2):
                row = draft[request, 1, layer, head].tolist()
                mass = sum(row[:position])
                target = state.scores.probabilities[request, layer, head].float()
                for token, said in enumerate(row):
                    expected = said
                    if token < position:
                        seen = float(target[token] / target.sum())
                        expected = (1 - w) * said + w * mass * seen
                    assert float(found[request, 1, layer, head, token]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_whose_turn_it_is_reads_everything_and_the_others_do_not(group):
    method, round = make("specattn:p=0.5:signals=both:refresh=3", group)
    plain = prepared(method, round)
    turns = torch.arange(len(LENGTHS)) % 2 == 0
    state = replace(plain, scores=replace(stored_scores(round), everything=turns))
    expected = method.select(round.layer(method, LAYER, plain))
    found = method.select(round.layer(method, LAYER, state))
    for request, everything in enumerate(turns.tolist()):
        if everything:
            assert found.counts[request].tolist() == [LENGTHS[request] + ROWS] * 2
            assert float(found.extra_bytes[request]) == 0
        else:
            assert torch.equal(found.indices[request], expected.indices[request])
            assert float(found.extra_bytes[request]) == 2 * 2 * max(0, LENGTHS[request] - 9)


@pytest.mark.parametrize(
    "options,message",
    [
        ("signals=all", "signals='all' is unknown"),
        ("signals=both:map=layer", "use map=heads or map=global"),
        ("signals=both:gqa=max", "with gqa=mean"),
        ("refresh=4", "add it, or leave refresh out"),
        ("signals=both:refresh=-1", "refresh=-1 is below 0"),
    ],
)
def test_what_cannot_be_joined_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        parse_method(f"specattn:{options}")
