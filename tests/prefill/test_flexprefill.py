"""FlexPrefill against a plain reading of the paper's definitions, on heads of a known pattern, and its options."""

from __future__ import annotations

import math

import pytest
import torch
from known_heads import LENGTH, call_of, slash_head, topic_head, vertical_head
from prefill_calls import causal_logits, masked_attention, owner, random_call
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall
from specattn.prefill.flexprefill import FlexPrefill, jensen_shannon
from specattn.prefill.registry import parse_prefill

BLOCK = 16


def covering(scores: list[float], gamma: float, least: int = 0, forced: int | None = None) -> set[int]:
    """The fewest places, ``forced`` among them, that hold ``gamma`` of the scores; and the ``least`` best ones."""
    order = sorted(range(len(scores)), key=lambda place: (place != forced, -scores[place]))
    kept: list[int] = []
    for place in order:
        if sum(scores[other] for other in kept) >= gamma * sum(scores):
            break
        kept.append(place)
    return {*kept, *order[:least]}


def means(tokens: Tensor) -> list[Tensor]:
    return [tokens[first : first + BLOCK].double().mean(0) for first in range(0, len(tokens), BLOCK)]


def reading(call: PrefillCall, head: int, gamma: float, tau: float, least: int) -> tuple[Tensor, float]:
    """What the rows of a head read, bool ``[rows, length]``, and its Jensen-Shannon distance."""
    rows, length = len(call.query), len(call.key)
    key_blocks = -(-length // BLOCK)
    probabilities = causal_logits(call, head).softmax(-1)[-BLOCK:].tolist()
    by_key, by_distance = [0.0] * key_blocks, [0.0] * key_blocks
    for row, weights in enumerate(probabilities):
        position = length - len(probabilities) + row
        for key in range(position + 1):
            by_key[key // BLOCK] += weights[key] / len(probabilities)
            by_distance[position // BLOCK - key // BLOCK] += weights[key] / len(probabilities)

    keys = means(call.key[:, owner(call, head)])
    query = call.query[-BLOCK:, head].double().mean(0)
    estimate = torch.stack([query @ key for key in keys]).mul(call.scaling).softmax(0).tolist()
    divergence = 0.0
    for p, q in zip(estimate, by_key, strict=True):
        middle = (p + q) / 2
        divergence += sum(side * math.log(side / middle) for side in (p, q) if side) / 2
    distance = math.sqrt(divergence)

    aware = distance < tau
    share = 1e-300 if aware else gamma
    verticals = covering(by_key, share, least, forced=0)
    slashes = covering(by_distance, share, least, forced=0)
    blocks = pooled_blocks(call, head, keys, gamma) if aware else set()
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        first = row // BLOCK * BLOCK
        own = {(call.start + other) // BLOCK for other in range(first, min(first + BLOCK, rows))}
        for key in range(call.start + row + 1):
            block = key // BLOCK
            line = block in verticals or any(mine - block in slashes for mine in own)
            mask[row, key] = line or block in own or (row // BLOCK, block) in blocks
    return mask, distance


def pooled_blocks(call: PrefillCall, head: int, keys: list[Tensor], gamma: float) -> set[tuple[int, int]]:
    """The pairs of pooled blocks that hold ``gamma`` of the attention between all pooled blocks."""
    places, scores = [], []
    for number, query in enumerate(means(call.query[:, head])):
        last = min((number + 1) * BLOCK, len(call.query)) - 1
        seen = range((call.start + last) // BLOCK + 1)
        weights = torch.stack([query @ keys[block] for block in seen]).mul(call.scaling).softmax(0)
        places += [(number, block) for block in seen]
        scores += weights.tolist()
    return {places[place] for place in covering(scores, gamma)}


@pytest.mark.parametrize("group", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,start", [(93, 0), (64, 32), (41, 57), (7, 90)])
@pytest.mark.parametrize("tau", [0.0, 0.12, 2.0])
def test_it_is_the_definition(group: int, rows: int, start: int, tau: float) -> None:
    torch.manual_seed(rows * group)
    call = random_call(rows, start, group, 1)
    method = FlexPrefill(gamma=0.6, tau=tau, block=BLOCK, min_budget=20)
    out, (_, query_aware) = method.attention(call).out, method.pattern(call)
    for head in range(group):
        mask, distance = reading(call, head, 0.6, tau, 2)
        assert query_aware[head] == (distance < tau)
        assert error_ratio(out[:, head], masked_attention(call, head, mask)) < 1e-5


def test_the_random_heads_are_of_both_kinds() -> None:
    torch.manual_seed(93 * 8)
    _, query_aware = FlexPrefill(tau=0.12, block=BLOCK).pattern(random_call(93, 0, 8, 1))
    assert 0 < query_aware.sum() < 8


def dense(call: PrefillCall) -> Tensor:
    return dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling)


def test_heads_of_a_known_pattern_get_it() -> None:
    torch.manual_seed(4)
    call = call_of(vertical_head([7, 200, 201, 390]), slash_head(250), topic_head())
    method = FlexPrefill(gamma=0.99, block=BLOCK, min_budget=BLOCK)
    pattern, query_aware = method.pattern(call)
    assert query_aware.tolist() == [False, False, True]
    key_blocks = pattern.mask[0, -1].nonzero()[:, 0].tolist()
    assert key_blocks == [0, 12, 24, LENGTH // BLOCK - 1]
    # 250 tokens are 15 blocks and 10 tokens: rows of a block look 15 and 16 blocks back.
    assert {20, 19} <= set(pattern.mask[1, 35].nonzero()[:, 0].tolist())
    out, exact = method.attention(call).out, dense(call)
    assert error_ratio(out[:, 0], exact[:, 0]) < 1e-3
    assert error_ratio(out[300:, 1], exact[300:, 1]) < 1e-3
    assert error_ratio(out[:, 2], exact[:, 2]) < 0.2
    assert (pattern.products(call) / (LENGTH * (LENGTH + 1) / 2) < 0.4).all()


def test_more_gamma_reads_more_and_errs_less() -> None:
    torch.manual_seed(5)
    call = random_call(300, 0, 4, 2)
    outputs = [
        FlexPrefill(gamma=gamma, block=BLOCK, min_budget=0).attention(call) for gamma in (0.3, 0.6, 0.9)
    ]
    computed = [float(output.computed) for output in outputs]
    errors = [error_ratio(output.out, dense(call)) for output in outputs]
    assert computed == sorted(computed) and len(set(computed)) == 3
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_the_minimum_budget_is_kept() -> None:
    torch.manual_seed(6)
    call = call_of(vertical_head([7]))
    pattern, _ = FlexPrefill(gamma=0.1, tau=0, block=BLOCK, min_budget=100).pattern(call)
    # 7 vertical blocks and 7 slash blocks, which may meet.
    assert 7 <= pattern.mask[0, -1].sum() <= 14


@pytest.mark.parametrize("length,start", [(1024, 0), (256, 0), (24, 1000)])
def test_short_contexts_are_dense(length: int, start: int) -> None:
    torch.manual_seed(7)
    call = random_call(length, start, 2, 1)
    output = FlexPrefill().attention(call)
    assert output.computed == 1
    assert torch.equal(output.out, dense(call))
    assert FlexPrefill().attention(random_call(1, 1024, 2, 1)).computed != 1


def test_jensen_shannon_distance() -> None:
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert jensen_shannon(p, q).tolist() == pytest.approx([math.sqrt(math.log(2)), 0])
    narrow = torch.tensor([1.0, 0.0, 0.0])
    assert jensen_shannon(narrow, narrow) == 0


@pytest.mark.parametrize(
    "spec,named",
    [
        ("flexprefill:gamma=0", "gamma=0"),
        ("flexprefill:gamma=1.1", "gamma=1.1"),
        ("flexprefill:tau=-0.1", "tau=-0.1"),
        ("flexprefill:block=0", "block=0"),
        ("flexprefill:min_budget=-1", "min_budget=-1"),
        ("flexprefill:gama=0.9", "gamma"),
    ],
)
def test_bad_options_are_refused(spec: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse_prefill(spec)
