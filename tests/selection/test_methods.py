"""Each method against a plain reading of its definition; the contract that all share is in test_matrix.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from paged import SCALING, paged_round
from plain import listed, smallest_nucleus
from tiny import tiny_mapping, tiny_pair

from specattn.draft_attention import DraftAttention, ExportedHeads
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.selection.registry import get_method, parse_method, split_methods

LENGTHS, ROWS = [23, 41, 9], 3
PAIR = tiny_pair("qwen2", layers=4)
TARGET = KVGeometry.from_config(PAIR.target.config, torch.float32)
DRAFT = KVGeometry.from_config(PAIR.draft.config, torch.float32)
MAPPING = tiny_mapping(PAIR)


def round_state(method: Method) -> RoundState:
    draft = DraftAttention(
        ExportedHeads.of(DRAFT, method.draft_heads(MAPPING), torch.device("cpu")),
        batch=len(LENGTHS),
        rows=ROWS - 1,
        length=max(LENGTHS) + ROWS,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(2)
    for request, (row, layer) in itertools.product(
        range(len(LENGTHS)), itertools.product(range(ROWS - 1), range(DRAFT.layers))
    ):
        scores = 3 * torch.randn(DRAFT.query_heads, 1, LENGTHS[request] + row + 1, generator=generator)
        if draft.wants(layer):
            draft.record(layer, request, row, 0, scores.softmax(-1))
    return paged_round(TARGET, LENGTHS, ROWS).state(draft, MAPPING)


def select(method: Method, layer: int = 3) -> tuple[Selection, RoundState, LayerState]:
    state = round_state(method)
    layer_state = paged_round(TARGET, LENGTHS, ROWS, method.stores, seed=1).layer(method, layer, state)
    return method.select(layer_state), state, layer_state


def test_dense_has_no_sparse_layer_and_the_others_keep_the_first_two_dense():
    assert all(get_method("dense").is_dense(layer) for layer in range(40))
    for name in ("specattn", "streaming", "oracle"):
        assert [get_method(name).is_dense(layer) for layer in range(4)] == [True, True, False, False]
        assert not get_method(name, dense_layers=0).is_dense(0)


@pytest.mark.parametrize(
    "options", ["p=0.5", "p=0.5:tail=0.1", "rate=0.1", "p=0.5:gqa=union", "p=0.5:map=layer"]
)
def test_short_contexts_are_read_whole_and_others_as_ever(options):
    text = f"specattn:{options}:seed=2"
    some, all_short = (select(parse_method(f"{text}:dense_below={least}"))[0] for least in (27, 45))
    usual, _, _ = select(parse_method(text))
    ends = [length + ROWS for length in LENGTHS]
    for request, whole in enumerate([True, False, True]):  # of 26, 44 and 12 tokens
        assert all_short.counts[request].tolist() == [ends[request]] * TARGET.kv_heads
        for head in range(TARGET.kv_heads):
            expected = set(range(ends[request])) if whole else listed(usual, request, head)
            assert listed(some, request, head) == expected
            if whole and some.log_weights is not None:
                assert not some.log_weights[request, head, : ends[request]].any()
    assert int(usual.counts.max()) < max(ends)


def test_streaming_reads_its_sinks_and_its_window():
    selection, _, _ = select(get_method("streaming", budget=6, sink=2))
    for request, length in enumerate(LENGTHS):
        expected = [0, 1, *range(length - 4, length + ROWS)]
        for head in range(TARGET.kv_heads):
            count = int(selection.counts[request, head])
            assert selection.indices[request, head, :count].tolist() == expected


@pytest.mark.parametrize("budget,dilation", [(6, 3), (20, 2), (30, 3), (1.0, 4)])
def test_longformers_window_is_dilated_and_goes_back_to_what_it_passed_over(budget, dilation):
    selection, _, _ = select(get_method("longformer", budget=budget, sink=2, dilation=dilation))
    for request, length in enumerate(LENGTHS):
        left = (length if budget == 1 else min(int(budget), length)) - 2
        ages = sorted(range(max(0, length - 2)), key=lambda age: (age % dilation != 0, age))
        window = {length - 1 - age for age in ages[:left]}
        assert listed(selection, request, 0) == {0, 1, *range(length, length + ROWS), *window}


def test_bigbird_reads_whole_blocks_first_recent_and_random_ones():
    selection, _, _ = select(get_method("bigbird", budget=20, block=4, first=1, recent=2))
    drawn = []
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        length = LENGTHS[request]
        context = {t for t in listed(selection, request, head) if t < length}
        blocks = {t // 4 for t in context}
        assert context == {t for t in range(length) if t // 4 in blocks}
        last = (length - 1) // 4
        assert {0, last, last - 1} <= blocks
        assert len(blocks) == min(5, last + 1)
        drawn.append((request, frozenset(blocks)))
    assert len(set(drawn)) > len(LENGTHS), "heads draw their own blocks"


def test_random_is_uniform_reproducible_and_differs_between_lists():
    method = get_method("random", budget=0.25, sink=0, window=0)
    state = round_state(method)
    first, again = method.prepare(state), method.prepare(state)
    assert torch.equal(first.indices, again.indices)
    other = get_method("random", budget=0.25, sink=0, window=0, seed=1).prepare(state)
    assert not torch.equal(first.indices, other.indices)
    layers, heads = TARGET.layers, TARGET.kv_heads
    lists = {
        tuple(first.indices[1, i, j].tolist()) for i, j in itertools.product(range(layers), range(heads))
    }
    assert len(lists) == layers * heads
    counts = torch.zeros(LENGTHS[1])
    for seed in range(200):
        drawn = get_method("random", budget=0.25, sink=0, window=0, seed=seed).prepare(state)
        counts += drawn.of_layer(2).to_mask(state.max_length)[1, 0, : LENGTHS[1]]
    expected = 200 * -(-LENGTHS[1] // 4) / LENGTHS[1]
    chi_square = float(((counts - expected) ** 2 / (expected * (1 - expected / 200))).sum())
    assert chi_square < 90  # 40 degrees of freedom: exceeded once in 100,000


def test_topk_takes_the_heaviest():
    selection, state, layer_state = select(get_method("topk", budget=5, sink=0, window=0))
    from specattn.selection.oracle import true_scores

    scores = true_scores(layer_state).unflatten(1, (TARGET.kv_heads, -1)).mean(2)
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        length = LENGTHS[request]
        best = scores[request, head, :length].topk(5).indices.tolist()
        assert listed(selection, request, head) == {*best, *range(length, length + ROWS)}
    assert state.rows == ROWS


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("layer", [0, 3])
def test_specattn_is_the_nucleus_of_the_mixed_mean_row(p, layer):
    selection, state, _ = select(get_method("specattn", p=p, sink=2, window=3), layer)
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        length = LENGTHS[request] + ROWS
        mixed = torch.zeros(length)
        for row, draft_head in itertools.product(range(ROWS - 1), range(MAPPING.heads_kv.shape[-1])):
            weight = MAPPING.heads_kv[layer, head, draft_head] / (ROWS - 1)
            mixed += weight * state.draft.probabilities[request, row, draft_head, :length]
        forced = {0, 1, *range(length - ROWS - 3, length)}
        assert listed(selection, request, head) == smallest_nucleus(mixed, p, forced)


@pytest.mark.parametrize("layer", [0, 3])
def test_the_papers_method_joins_the_nuclei_of_the_mapped_layers_rows(layer):
    selection, state, _ = select(get_method("specattn-paper", p=0.6), layer)
    draft_layer = int(MAPPING.layer_map[layer])
    heads = slice(draft_layer * DRAFT.query_heads, (draft_layer + 1) * DRAFT.query_heads)
    for request in range(len(LENGTHS)):
        length = LENGTHS[request] + ROWS
        expected: set[int] = set()
        for row in range(ROWS - 1):
            weights = state.draft.probabilities[request, row, heads, :length].mean(0)
            expected |= smallest_nucleus(weights, 0.6, set(range(length - ROWS, length)))
        for head in range(TARGET.kv_heads):
            assert listed(selection, request, head) == expected


def test_group_policies_nest():
    union, _, _ = select(get_method("specattn", p=0.6, gqa="union"))
    group = TARGET.group
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        single: set[int] = set()
        state = round_state(get_method("specattn"))
        length = LENGTHS[request] + ROWS
        for query_head in range(head * group, (head + 1) * group):
            weights = MAPPING.heads_query[3, query_head] @ state.draft.probabilities[request].mean(0)
            single |= smallest_nucleus(
                weights[:length], 0.6, {*range(4), *range(max(0, length - ROWS - 16), length)}
            )
        assert listed(union, request, head) == single


def test_pages_are_taken_whole():
    tokens, state, _ = select(get_method("specattn", p=0.5, sink=0, window=0))
    pages, _, _ = select(get_method("specattn", p=0.5, sink=0, window=0, granularity="page", page=4))
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        touched = {i // 4 for i in listed(tokens, request, head)}
        expected = {i for i in range(int(state.lengths[request])) if i // 4 in touched}
        assert listed(pages, request, head) == expected


@pytest.mark.parametrize("gqa", ["mean", "max", "union"])
def test_the_oracle_holds_the_mass_it_promises(gqa):
    selection, _, layer_state = select(get_method("oracle", p=0.8, gqa=gqa))
    for request, head in itertools.product(range(len(LENGTHS)), range(TARGET.kv_heads)):
        keys = layer_state.source.keys(3)[request][:, head]
        kept = []
        chosen = listed(selection, request, head)
        for query_head in range(head * TARGET.group, (head + 1) * TARGET.group):
            mass = 0.0
            for row in range(ROWS):
                visible = LENGTHS[request] + row + 1
                logits = keys[:visible] @ layer_state.queries[request, row, query_head] * SCALING
                weights = logits.softmax(-1)
                mass += sum(float(weights[i]) for i in chosen if i < visible) / ROWS
            kept.append(mass)
        least = min(kept) if gqa == "union" else sum(kept) / len(kept)
        assert gqa == "max" or least >= 0.8 - 1e-5


def test_names_and_options_from_text():
    method = parse_method("specattn:p=0.9:map=global:sink=8")
    assert (method.p, method.map, method.sink) == (0.9, "global", 8)
    assert parse_method("streaming:budget=64").budget == 64
    assert split_methods("a:x=1, b:base=(c,d):y=2,") == ["a:x=1", "b:base=(c,d):y=2"]
    assert get_method("specattn-paper").options() | {"p": 0.9} == {
        **get_method("specattn").options(),
        "p": 0.9,
        "map": "layer",
        "aggregate": "union",
        "sink": 0,
        "window": 0,
    }


@pytest.mark.parametrize(
    "text,message",
    [
        ("quset", "unknown method 'quset'"),
        ("specatn", "did you mean 'specattn'"),
        ("specattn:q=1", "no option 'q'"),
        ("specattn:p", "not of the form"),
        ("specattn:p=", "not of the form"),
        ("specattn:p=high", "p='high' is not of type float"),
        ("specattn:sink=1.5", "sink='1.5' is not of type int"),
        ("specattn:p=0", r"p=0.0 is outside \(0, 1\]"),
        ("specattn:p=1.01", r"outside \(0, 1\]"),
        ("specattn:p=nan", r"outside \(0, 1\]"),
        ("specattn:map=head", "map='head' is unknown"),
        ("specattn:aggregate=max", "choose one of mean, rms, union"),
        ("specattn:granularity=block", "choose one of token, page"),
        ("specattn:gqa=vote", "choose one of mean, max, union"),
        ("specattn:window=-1", "window=-1 is below 0"),
        ("specattn:page=0", "page=0 is below 1"),
        ("specattn:dense_layers=-1", "dense_layers=-1 is below 0"),
        ("streaming:budget=0", "budget=0.0"),
        ("streaming:budget=2.5", "budget=2.5"),
        ("streaming:sink=-1", "sink=-1"),
        ("oracle:p=2", r"outside \(0, 1\]"),
        ("topk:budget=-1", "budget=-1.0"),
        ("topk:gqa=vote", "choose one of"),
        ("random:budget=1.5", "budget=1.5"),
        ("longformer:dilation=0", "dilation=0 is below 1"),
        ("bigbird:block=0", "block=0 is below 1"),
        ("bigbird:recent=0", "recent=0 is below 1"),
        ("dense:p=0.5", "no option 'p'"),
    ],
)
def test_refusals_name_the_value(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(text)
