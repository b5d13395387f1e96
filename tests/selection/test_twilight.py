"""Twilight against its definition, computed token by token, and what it hands on to the method that it wraps."""

from __future__ import annotations

import itertools

import pytest
import torch
from paged import SCALING, PagedRound, no_answers, paged_round
from plain import listed, smallest_nucleus
from tiny import tiny_mapping, tiny_pair

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.dense_attention import attention_probabilities
from specattn.selection.base import Need, Selection
from specattn.selection.dense import Dense
from specattn.selection.quest import Quest
from specattn.selection.registry import parse_method
from specattn.selection.specattn import SpecAttn
from specattn.selection.twilight import Twilight
from specattn.stores.page_bounds import PageBounds
from specattn.stores.quantised_keys import QuantisedKeys

LENGTHS = [57, 5, 96, 64]
POLICIES = list(itertools.product(["union", "mean", "max"], ["mean", "union"]))


def geometry(group: int, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> KVGeometry:
    return KVGeometry(layers=2, query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=16, dtype=dtype)


def select(method: Twilight, paged: PagedRound, layer: int = 1) -> Selection:
    with no_answers():
        return method.select(paged.layer(method, layer))


def estimated(key: torch.Tensor, bits: int) -> torch.Tensor:
    """One key as its copy of ``bits`` bits a channel remembers it."""
    middle = 2 ** (bits - 1)
    scale = float(((key.max() - key.min()) / (2**bits - 1)).half())
    zero = float((key.min() + middle * scale).half())
    codes = [min(middle - 1, max(-middle, round((value - zero) / scale))) for value in key.tolist()]
    return torch.tensor([code * scale + zero for code in codes])


def by_definition(
    method: Twilight, paged: PagedRound, candidates: list[int], request: int, head: int, layer: int = 1
) -> set[int]:
    length, rows, group = paged.lengths[request], paged.rows, paged.geometry.group
    keys = paged.source.keys(layer)[request][:, head]
    copies = torch.stack([estimated(keys[token], method.bits) for token in candidates])
    weights = torch.zeros(rows, group, len(candidates))
    for row, member in itertools.product(range(rows), range(group)):
        query = paged.queries(layer)[request, row, head * group + member]
        logits = copies @ query * SCALING
        seen = torch.tensor([token <= length + row for token in candidates])
        weights[row, member] = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    if method.aggregate == "mean":
        weights = weights.mean(0, keepdim=True)
    if method.gqa != "union":
        weights = weights.mean(1, keepdim=True) if method.gqa == "mean" else weights.amax(1, keepdim=True)
    own = {candidates.index(token) for token in range(length, length + rows)}
    kept: set[int] = set()
    for nucleus_of in weights.flatten(0, 1):
        kept |= smallest_nucleus(nucleus_of, method.p, own)
    return {candidates[i] for i in kept}


@pytest.mark.parametrize("gqa,aggregate", POLICIES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("group", [1, 3, 6, 8])
def test_the_nucleus_of_the_candidates_by_definition(group, rows, gqa, aggregate):
    base = Quest(budget=0.5, page=4)
    method = Twilight(base=base, p=0.4, gqa=gqa, aggregate=aggregate)
    paged = paged_round(geometry(group), LENGTHS, rows, method.stores)
    offered, kept = base.select(paged.layer(base, 1)), select(method, paged)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        candidates = sorted(listed(offered, request, head))
        chosen = listed(kept, request, head)
        assert chosen == by_definition(method, paged, candidates, request, head)
        assert set(range(LENGTHS[request], LENGTHS[request] + rows)) <= chosen <= set(candidates)
    assert bool((kept.counts <= offered.counts).all()) and int(kept.counts.sum()) < int(offered.counts.sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("p", [0.3, 0.85, 0.99])
def test_all_tokens_as_candidates(bits, p):
    method = Twilight(base=Dense(), p=p, bits=bits)
    paged = paged_round(geometry(3), LENGTHS, 3, method.stores, seed=bits)
    kept = select(method, paged)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        candidates = list(range(LENGTHS[request] + 3))
        assert listed(kept, request, head) == by_definition(method, paged, candidates, request, head)


def masses(kept: Selection, paged: PagedRound) -> torch.Tensor:
    """The exact attention, mean over the rows, that falls on the selection: ``[batch, query_heads]``."""
    result = []
    for request, keys in enumerate(paged.source.keys(1)):
        query = paged.queries(1)[request]
        exact = attention_probabilities(query, [(keys, keys)], paged.lengths[request], 0, SCALING).mean(1)
        mask = kept.to_mask(paged.state().max_length)[request, :, : len(keys)]
        result.append((exact * mask.repeat_interleave(paged.geometry.group, 0)).sum(-1))
    return torch.stack(result)


def test_four_bits_hold_the_mass_that_is_asked_for_and_two_do_not():
    paged = paged_round(
        geometry(1, kv_heads=6), [250, 201, 230], 3, [QuantisedKeys(bits) for bits in (2, 4, 8)]
    )
    missing = []
    for bits in (2, 4, 8):
        kept = select(Twilight(base=Dense(), p=0.85, bits=bits), paged)
        missing.append(float((0.85 - masses(kept, paged)).clamp(min=0).max()))
    assert missing[0] > 0.02
    assert missing[1] < 0.005
    assert missing[2] < 0.0005


def test_what_choosing_reads():
    base = Quest(budget=0.5, page=4)
    for bits, dtype in ((4, torch.float32), (8, torch.bfloat16)):
        method = Twilight(base=base, p=0.7, bits=bits)
        paged = paged_round(geometry(3, dtype=dtype), LENGTHS, 2, method.stores)
        offered, kept = base.select(paged.layer(base, 1)), select(method, paged)
        codes = offered.counts.sum(-1) * (16 * bits // 8 + 4)
        assert torch.equal(kept.extra_bytes, offered.extra_bytes + codes)
        assert float(offered.extra_bytes.min()) == 0 < float(offered.extra_bytes.max())


def test_a_nucleus_of_everything_is_what_the_base_selects_and_reads():
    base = Quest(budget=0.5, page=4)
    paged = paged_round(geometry(3), LENGTHS, 2, Twilight(base=base).stores)
    offered, kept = base.select(paged.layer(base, 1)), select(Twilight(base=base, p=1.0), paged)
    assert torch.equal(offered.indices, kept.indices)
    assert torch.equal(offered.extra_bytes, kept.extra_bytes)


@pytest.mark.parametrize("gqa,aggregate", POLICIES)
def test_rejected_tokens_and_neighbours_change_nothing(gqa, aggregate):
    method = Twilight(base=Quest(budget=0.5, page=4), gqa=gqa, aggregate=aggregate)
    plain = select(method, paged_round(geometry(3), LENGTHS, 2, method.stores))
    rolled = select(method, paged_round(geometry(3), LENGTHS, 2, method.stores, rejected=9))
    assert torch.equal(plain.indices, rolled.indices)
    for request, length in enumerate(LENGTHS):
        alone = select(method, paged_round(geometry(3), [length], 2, method.stores))
        assert all(listed(alone, 0, head) == listed(plain, request, head) for head in range(2))


def test_what_the_base_needs_is_asked_for():
    mapping = tiny_mapping(tiny_pair())
    draft = Twilight(base=SpecAttn(map="global"))
    assert draft.needs == Need.DRAFT | Need.MAPPING
    assert torch.equal(draft.draft_heads(mapping), mapping.global_heads)
    assert draft.stores == (QuantisedKeys(4),)
    quest = Twilight(base=Quest(page=32), bits=8)
    assert quest.needs == Need.NOTHING and quest.draft_heads(None) is None
    assert quest.stores == (PageBounds(32), QuantisedKeys(8))


def test_its_own_dense_layers_count():
    method = Twilight(base=Dense(), dense_layers=1)
    assert [method.is_dense(layer) for layer in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    "text,base",
    [
        ("twilight", Quest(budget=0.25)),
        ("twilight:base=quest", Quest(budget=0.25)),
        ("twilight:base=(quest:page=32)", Quest(budget=0.25, page=32)),
        ("twilight:base=(quest:budget=0.1)", Quest(budget=0.1)),
        ("twilight:base=(quest:budget=8192)", Quest(budget=8192)),
        ("twilight:base=full", Dense()),
        ("twilight:base=specattn", SpecAttn()),
        ("twilight:base=(specattn:p=0.99)", SpecAttn(p=0.99)),
    ],
)
def test_bases_from_text_offer_a_quarter_of_the_context_unless_told(text, base):
    method = parse_method(text)
    assert method == Twilight(base=base)
    assert parse_method(method.spec()) == method


def test_a_base_that_was_made_with_its_own_default_keeps_it():
    method = Twilight(base=Quest())
    assert method.options()["base"] == "quest:budget=0.1"
    assert parse_method(method.spec()) == method


@pytest.mark.parametrize(
    "text,message",
    [
        ("twilight:base=twilight", "base=twilight returns no plain lists"),
        ("twilight:base=(quest:page=3)", "page=3 is no power of two"),
        ("twilight:base=(quest:budge=3)", "did you mean 'budget'"),
        ("twilight:base=nobody", "unknown method 'nobody'"),
        ("twilight:p=0", r"p=0.0 is outside \(0, 1\]"),
        ("twilight:p=1.5", r"outside \(0, 1\]"),
        ("twilight:bits=3", "bits=3 is unknown; choose one of 2, 4, 8"),
        ("twilight:gqa=vote", "choose one of mean, max, union"),
        ("twilight:aggregate=max", "choose one of mean, union"),
        ("twilight:dense_layers=-1", "dense_layers=-1 is below 0"),
    ],
)
def test_refusals_name_the_value(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(text)
