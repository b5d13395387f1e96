"""The matrix that every method must pass: options x group sizes, on scattered pages, in a ragged batch.

What the selected lists are worth is seen in the attention over them, whose inputs are NaN wherever nobody may look.
No method may ask the device for a value.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from paged import SCALING, PagedRound, no_answers, paged_round
from tiny import random_mapping
from variants import DENSE, VARIANTS

from specattn.draft_attention import DraftAttention, ExportedHeads
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.kernels.sparse_attention import sparse_attention
from specattn.mapping.samples import Geometry
from specattn.selection.base import Method, Need, RoundState, Selection
from specattn.selection.eviction import Evicting
from specattn.selection.registry import METHODS, method_class, parse_method
from specattn.target_scores import StoredScores

LAYERS, LAYER, ROWS = 3, 2, 3
LENGTHS = [40, 16, 32, 31, 33, 7]  # on, before and behind a page's end; shorter than sink and window together
GROUPS = [1, 3, 6, 8]
DRAFT = KVGeometry(2, 4, 2, 8, torch.float32)


def geometry(group: int) -> KVGeometry:
    kv_heads = 2
    return KVGeometry(LAYERS, group * kv_heads, kv_heads, 8, torch.float32)


def draft_attention(method: Method, lengths: list[int], rows: int, mapping) -> DraftAttention:
    """The draft's rows of a round, those of a request depend on its length alone."""
    export = DraftAttention(
        ExportedHeads.of(DRAFT, method.draft_heads(mapping), torch.device("cpu")),
        batch=len(lengths),
        rows=rows,
        length=max(lengths) + rows + 1,
        device=torch.device("cpu"),
    )
    for request, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        for row, layer in itertools.product(range(rows), range(DRAFT.layers)):
            scores = 3 * torch.randn(DRAFT.query_heads, 1, length + row + 1, generator=generator)
            if export.wants(layer):
                export.record(layer, request, row, 0, scores.softmax(-1))
    return export


def prepared(method: Method, round: PagedRound) -> RoundState:
    target = round.geometry
    shapes = Geometry(LAYERS, target.query_heads, target.kv_heads, DRAFT.layers, DRAFT.query_heads)
    mapping = random_mapping(shapes)
    draft = None
    if Need.DRAFT in method.needs:
        draft = draft_attention(method, round.lengths, max(1, round.rows - 1), mapping)
    scores = stored_scores(round) if Need.SCORES in method.needs else None
    return replace(round.state(draft, mapping), scores=scores)


def stored_scores(round: PagedRound) -> StoredScores:
    """What the target saw some tokens ago, a request's by its length alone; the shortest has had no dense pass."""
    probabilities = torch.zeros(len(round.lengths), LAYERS, 2, max(round.lengths), dtype=torch.bfloat16)
    positions = [max(0, length - 9) for length in round.lengths]
    for request, position in enumerate(positions):
        generator = torch.Generator().manual_seed(position)
        logits = 3 * torch.randn(LAYERS, 2, position, generator=generator)
        probabilities[request, ..., :position] = logits.softmax(-1)
    return StoredScores(
        probabilities,
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32),
        torch.zeros(len(positions), dtype=torch.bool),
    )


def select(method: Method, round: PagedRound) -> Selection:
    state = prepared(method, round)
    with no_answers():
        return method.select(round.layer(method, LAYER, state))


def attend(round: PagedRound, selection: Selection) -> torch.Tensor:
    keys, values = round.source.gather(LAYER, selection.indices)
    queries = round.queries(LAYER)
    return sparse_attention(queries, keys, values, selection, round.step.positions, SCALING)


def make(text: str, group: int, lengths=LENGTHS, rows=ROWS, **options) -> tuple[Method, PagedRound]:
    method = parse_method(text)
    return method, paged_round(geometry(group), lengths, rows, method.stores, **options)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("text", VARIANTS)
def test_lists_are_ascending_padded_counted_and_hold_the_rounds_tokens(text, group):
    method, round = make(text, group)
    selection = select(method, round)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.indices.shape[:2] == selection.counts.shape == (len(LENGTHS), 2)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        count = int(selection.counts[request, head])
        chosen = selection.indices[request, head, :count].tolist()
        visible = LENGTHS[request] + ROWS
        assert chosen == sorted(set(chosen)), "ascending, no duplicates"
        assert chosen[0] >= 0 and chosen[-1] == visible - 1
        assert set(range(LENGTHS[request], visible)) <= set(chosen)
        assert (selection.indices[request, head, count:] == -1).all()
    assert int(selection.counts.sum()) < 2 * sum(length + ROWS for length in LENGTHS), (
        "something was left out"
    )
    assert not attend(round, selection).isnan().any()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("text", DENSE)
def test_a_full_budget_is_dense(text, group):
    method, round = make(text, group)
    selection = select(method, round)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32) + ROWS
    assert torch.equal(selection.counts, lengths[:, None].expand(-1, 2))
    dense = parse_method("dense")
    expected = attend(round, dense.select(round.layer(dense, LAYER)))
    assert error_ratio(attend(round, selection), expected) < 1e-6


@pytest.mark.parametrize("text", VARIANTS)
def test_neighbours_change_nothing(text):
    method, round = make(text, 3)
    together = attend(round, select(method, round))
    for request, length in enumerate(LENGTHS):
        _, alone = make(text, 3, lengths=[length])
        assert error_ratio(together[request], attend(alone, select(method, alone))[0]) < 1e-6


@pytest.mark.parametrize("text", VARIANTS)
def test_one_row_at_a_time_without_a_round(text):
    method, round = make(text, 3, rows=1)
    selection = select(method, round)
    for request, head in itertools.product(range(len(LENGTHS)), range(2)):
        count = int(selection.counts[request, head])
        assert int(selection.indices[request, head, count - 1]) == LENGTHS[request]
    assert not attend(round, selection).isnan().any()


@pytest.mark.parametrize("rejected", [1, 9, 20])
@pytest.mark.parametrize("text", VARIANTS)
def test_rejected_tokens_leave_no_trace(text, rejected):
    method, round = make(text, 3)
    _, after_rollback = make(text, 3, rejected=rejected)
    expected, found = select(method, round), select(method, after_rollback)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.indices, expected.indices)
    assert error_ratio(attend(after_rollback, found), attend(round, expected)) == 0


@pytest.mark.parametrize("text", VARIANTS)
def test_pages_and_their_size_change_nothing(text):
    method, round = make(text, 3)
    _, larger = make(text, 3, page_size=64)
    expected, found = select(method, round), select(method, larger)
    assert torch.equal(found.indices, expected.indices)
    assert error_ratio(attend(larger, found), attend(round, expected)) == 0


def test_every_method_is_in_the_matrix():
    """Methods that evict choose no lists; ``test_eviction.py`` holds them to the same."""
    choosing = {name for name in METHODS if not issubclass(method_class(name), Evicting)}
    assert {text.partition(":")[0] for text in VARIANTS} == choosing - {"dense"}
    assert {text.partition(":")[0] for text in DENSE} == choosing
