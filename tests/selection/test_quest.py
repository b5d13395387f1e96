"""Quest against its definition, computed from the keys themselves, query by query and page by page."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import SCALING, PagedRound, no_answers, paged_round
from plain import listed

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.page_scores import page_scores_reference
from specattn.selection.base import Selection
from specattn.selection.quest import Quest
from specattn.selection.registry import parse_method
from specattn.stores.base import LARGEST_PAGE

LENGTHS = [57, 5, 96, 64, 15]


def geometry(group: int, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> KVGeometry:
    return KVGeometry(layers=2, query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=8, dtype=dtype)


def select(method: Quest, paged: PagedRound, layer: int = 1) -> Selection:
    with no_answers():
        return method.select(paged.layer(method, layer))


def page_score(query: torch.Tensor, keys: torch.Tensor) -> float:
    """Of one page: the sum over the channels of the larger product with the channel's extremes."""
    products = [
        max(float(q) * float(channel.min()), float(q) * float(channel.max()))
        for q, channel in zip(query, keys.T, strict=True)
    ]
    return sum(products) * SCALING


def combined(scores: list[list[float]], policy: str) -> list[list[float]]:
    """Several queries' softmaxes over the pages as one."""
    if policy == "union":
        return scores
    columns = list(zip(*scores, strict=True))
    return [[max(column) if policy == "max" else sum(column) / len(column) for column in columns]]


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def by_definition(method: Quest, paged: PagedRound, request: int, head: int, layer: int = 1) -> set[int]:
    length, page, group = paged.lengths[request], method.page, paged.geometry.group
    keys = paged.source.keys(layer)[request][:, head]
    budget = math.ceil(method.budget * length) if method.budget <= 1 else min(length, int(method.budget))
    begun = length % page > 0
    count = max(3, math.ceil(budget / page)) - begun
    pages = [keys[first : first + page] for first in range(0, length - page + 1, page)]
    if not pages:
        return set(range(length + paged.rows))
    heads: list[list[list[float]]] = []  # for each query head of the group, its rows' weights of the pages
    for member in range(group):
        queries = paged.queries(layer)[request, :, head * group + member]
        rows = [softmax([page_score(query, keys_of_page) for keys_of_page in pages]) for query in queries]
        heads.append(combined(rows, method.aggregate))
    chosen: set[int] = set()
    for row in zip(*heads, strict=True):
        for weights in combined(list(row), method.gqa):
            chosen |= set(sorted(range(len(pages)), key=lambda i: -weights[i])[:count])
    tokens = {token for i in chosen for token in range(i * page, (i + 1) * page)}
    return tokens | set(range(len(pages) * page, length + paged.rows))


POLICIES = list(itertools.product(["mean", "max", "union"], repeat=2))


@pytest.mark.parametrize("gqa,aggregate", POLICIES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("group", [1, 3, 6, 8])
def test_the_best_pages_by_definition(group, rows, gqa, aggregate):
    method = Quest(budget=0.4, page=4, gqa=gqa, aggregate=aggregate)
    paged = paged_round(geometry(group), LENGTHS, rows, method.stores)
    selection = select(method, paged)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        assert listed(selection, request, head) == by_definition(method, paged, request, head)


@pytest.mark.parametrize("page", [1, 2, 16, 32])
@pytest.mark.parametrize("budget", [0.05, 0.5, 20, 70])
def test_pages_and_budgets(page, budget):
    method = Quest(budget=budget, page=page)
    paged = paged_round(geometry(3), LENGTHS, 2, method.stores, seed=page)
    selection = select(method, paged)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        chosen = listed(selection, request, head)
        assert chosen == by_definition(method, paged, request, head)
        length = LENGTHS[request]
        wanted = math.ceil(budget * length) if budget <= 1 else min(length, budget)
        context = len([token for token in chosen if token < length])
        assert context <= max(3, -(-wanted // page)) * page


@pytest.mark.parametrize("gqa,aggregate", POLICIES)
def test_one_query_is_ranked_by_its_bounds_however_far_apart_they_are(gqa, aggregate):
    """Where a softmax would leave all pages but one without weight."""
    method = Quest(budget=0.5, page=4, gqa=gqa, aggregate=aggregate)
    paged = paged_round(geometry(1), [96], 1, method.stores)
    state = paged.layer(method, 0)
    state = replace(state, queries=1000 * state.queries)
    selection = method.select(state)
    for head in range(2):
        keys = paged.source.keys(0)[0][:96, head].unflatten(0, (-1, 4))
        scores = [page_score(state.queries[0, 0, head], page) for page in keys]
        best = sorted(range(24), key=lambda i: -scores[i])[:12]
        assert sum(max(scores) - scores[i] > 104 for i in best) > 6, "these weights are 0 in float32"
        assert {token // 4 for token in listed(selection, 0, head) if token < 96} == set(best)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8]), st.sampled_from([1, 3]), st.integers(1, 40))
def test_no_key_of_a_page_exceeds_its_score(seed, page, group, length):
    method = Quest(page=page)
    paged = paged_round(geometry(group, kv_heads=1), [length], 2, method.stores, seed)
    state = paged.layer(method, 1)
    filled = state.round.starts // page
    scores = page_scores_reference(state.queries, *method._bounds(state), filled, SCALING)[0, 0]
    keys = paged.source.keys(1)[0][:, 0]
    logits = torch.einsum("rgc,nc->rgn", state.queries[0], keys) * SCALING
    for first in range(0, length - page + 1, page):
        largest = logits[..., first : first + page].amax(-1)
        assert bool((scores[..., first // page] >= largest - 1e-5).all())
        if page == 1:
            torch.testing.assert_close(scores[..., first], largest, rtol=1e-5, atol=1e-5)


def test_three_pages_at_least_the_last_one_whatever_its_score():
    method = Quest(budget=2, page=4)
    paged = paged_round(geometry(2), [57, 60], 1, method.stores)
    selection = select(method, paged)
    for head in range(2):
        begun = {token // 4 for token in listed(selection, 0, head) if token < 57}
        whole = {token // 4 for token in listed(selection, 1, head) if token < 60}
        assert 14 in begun and len(begun) == 3
        assert len(whole) == 3


def test_the_bounds_of_filled_pages_are_what_choosing_reads():
    for dtype in (torch.float32, torch.bfloat16):
        method = Quest(budget=0.5, page=4)
        paged = paged_round(geometry(3, dtype=dtype), LENGTHS, 2, method.stores)
        selection = select(method, paged)
        # 2 KV heads, 8 channels, a minimum and a maximum; the only full page of five tokens is read unscored.
        pages = [length // 4 if length > 12 else 0 for length in LENGTHS]
        assert selection.extra_bytes.tolist() == [n * 2 * 2 * 8 * dtype.itemsize for n in pages]


def test_a_budget_for_all_reads_no_bounds():
    method = Quest(budget=1.0, page=4)
    selection = select(method, paged_round(geometry(3), LENGTHS, 2, method.stores))
    assert selection.extra_bytes.tolist() == [0] * len(LENGTHS)
    assert selection.counts.tolist() == [[length + 2] * 2 for length in LENGTHS]


def test_rejected_tokens_and_neighbours_change_nothing():
    method = Quest(budget=0.4, page=4)
    plain = select(method, paged_round(geometry(3), LENGTHS, 2, method.stores))
    rolled = select(method, paged_round(geometry(3), LENGTHS, 2, method.stores, rejected=9))
    assert torch.equal(plain.indices, rolled.indices)
    for request, length in enumerate(LENGTHS):
        alone = select(method, paged_round(geometry(3), [length], 2, method.stores))
        assert all(listed(alone, 0, head) == listed(plain, request, head) for head in range(2))


def test_a_larger_page_of_the_pool_makes_no_difference():
    method = Quest(budget=0.4, page=4)
    small, large = (
        select(method, paged_round(geometry(3), LENGTHS, 2, method.stores, page_size=n)) for n in (4, 64)
    )
    assert torch.equal(small.indices, large.indices)


@pytest.mark.parametrize(
    "text,message",
    [
        ("quest:page=24", "page=24 is no power of two"),
        ("quest:page=0", "page=0 is no power of two"),
        (f"quest:page={2 * LARGEST_PAGE}", f"up to {LARGEST_PAGE}"),
        ("quest:budget=0", "budget=0.0 is neither"),
        ("quest:budget=1.5", "budget=1.5 is neither"),
        ("quest:budget=nan", "budget=nan is neither"),
        ("quest:budget=inf", "budget=inf is neither"),
        ("quest:gqa=vote", "choose one of mean, max, union"),
        ("quest:aggregate=sum", "aggregate='sum' is unknown"),
    ],
)
def test_refusals_name_the_value(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(text)
