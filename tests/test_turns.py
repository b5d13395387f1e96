"""A sparse draft's heads are scored by turns: whose turn it is, and what their lists hold in the meantime."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_fast import make
from test_fast_engine import PROMPT, RAGGED, engine, figures, serve
from test_sparse_draft_rounds import LONG, ask
from tiny import tiny_mapping
from torch import Tensor

from specattn.fast.model import FastModel
from specattn.fast.sparse_draft import WINDOW, DraftMemory, newest
from specattn.fast.turns import TURNS, Turns, following
from specattn.kernels.quantised_round_scores import quantised_round_scores_reference
from specattn.kernels.round_scores import round_scores_reference
from specattn.pairs import Pair

METHOD = "specattn:map=global:p=0.6:draft_p=0.5"
LAYERS, KV_HEADS = 4, 2
EXPORTED = [1, 3]
"""KV heads of all layers with a head that the mapping of these tests uses."""


def places(*exported: int, group: int = 3) -> Tensor:
    """Of five layers with two KV heads each; of each group that is named its last head is exported."""
    result = torch.full((10, group), -1, dtype=torch.int32)
    for place, head in enumerate(exported):
        result[head, -1] = place
    return result.view(5, -1)


def test_each_head_has_its_turn():
    turns = Turns(places(0, 3, 4), kv_heads=2)
    rounds, due = torch.zeros(2, dtype=torch.int64), []
    for _ in range(3 * TURNS):
        due.append(turns.due(rounds)[0])
        rounds = following(rounds)
    due = torch.stack(due).int()
    assert turns.count == TURNS and due[0].all(), "the first round scores all"
    assert due[:, [0, 3, 4]].all(), "what the mapping uses is scored in every round"
    for first in range(2 * TURNS):
        assert (due[first : first + TURNS].sum(0) >= 1).all()
    others = due[1 : 1 + TURNS, [1, 2, 5, 6, 7, 8, 9]]
    assert (others.sum(0) == 1).all()
    assert others.sum(1).max() == 1, "as evenly as it goes"


def test_requests_have_turns_of_their_own():
    turns = Turns(places(0), kv_heads=2)
    together = turns.due(torch.tensor([0, 3, 8]))
    assert torch.equal(together, torch.cat([turns.due(torch.tensor([at])) for at in (0, 3, 8)]))
    assert not torch.equal(together[1], together[2])


def test_where_all_are_exported_none_waits():
    assert Turns(places(*range(10)), kv_heads=2).count == 1
    assert newest(4, 1) < newest(4) == newest(4, TURNS)


class Watched:
    """What rounds ask of their operations: whose turn it was, and the lists, in the order in which they were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from specattn.kernels.nucleus_lists_reference import nucleus_lists_reference

        self.due: list[tuple[list[int], list[int], Tensor]] = []
        """Slots, tokens that the last row sees, and bool ``[batch, LAYERS * KV_HEADS]``, of each round."""
        self.lists: list[tuple[list[int], list[int], int, Tensor]] = []
        """Slots, tokens that the last step sees, how many the newest are, and counts, of each round."""
        self._nucleus = nucleus_lists_reference
        kernels = "specattn.kernels."
        monkeypatch.setattr(f"{kernels}round_scores.round_scores_reference", self._score)
        monkeypatch.setattr(
            f"{kernels}quantised_round_scores.quantised_round_scores_reference", self._score_quantised
        )
        monkeypatch.setattr(f"{kernels}nucleus_lists_reference.nucleus_lists_reference", self._list)

    def _score(self, query: Tensor, keys: Tensor, batch, *more, due: Tensor, **out) -> None:
        round_scores_reference(query, keys, batch, *more, due=due, **out)
        self._note(batch, due)

    def _score_quantised(self, query: Tensor, keys, batch, *more, due: Tensor, **out) -> None:
        quantised_round_scores_reference(query, keys, batch, *more, due=due, **out)
        self._note(batch, due)

    def _note(self, batch, due: Tensor) -> None:
        self.due.append((batch.slots.tolist(), batch.lengths.tolist(), due.clone()))

    def _list(self, scores: Tensor, p: float, lengths: Tensor, *, recent: int, entries=None, **options):
        found = self._nucleus(scores, p, lengths, recent=recent, entries=entries, **options)
        if entries is not None:
            counts = options["out"].counts.clone()
            self.lists.append((entries.tolist(), lengths.tolist(), recent, counts))
            indices = options["out"].padded().indices
            for request, length in enumerate(lengths.tolist()):
                assert indices[request].max() < length
        return found

    def of_slot(self, slot: int) -> Tensor:
        """Whose turn it was in the rounds of ``slot``: bool ``[rounds, LAYERS * KV_HEADS]``."""
        return torch.stack([due[slots.index(slot)] for slots, _, due in self.due if slot in slots])

    def check_newest(self, spare: int, gamma: int) -> int:
        """Tokens without scores, and :data:`WINDOW` more, are among the newest of each list; how many they were."""
        scored: dict[int, Tensor] = {}
        waited = 0
        for (slots, ends, recent, _), (_, seen, due) in zip(self.lists, self.due, strict=True):
            for request, slot in enumerate(slots):
                if slot == spare:
                    continue
                begin = ends[request] - gamma
                whole = torch.full((LAYERS * KV_HEADS,), begin)
                # What was taken back has no scores any more.
                known = torch.minimum(scored.get(slot, whole), whole)
                without = ends[request] - known.min().item()
                assert without <= recent - WINDOW
                waited = max(waited, without)
                assert seen[request] == ends[request]
                scored[slot] = torch.where(due[request], begin + 1, known)
        return waited


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make("qwen2", layers=LAYERS)


@pytest.mark.parametrize("keys", ["none", "int8"])
def test_a_new_request_in_a_used_slot_has_all_heads_scored_first(watched, pair, keys):
    method = f"{METHOD}:draft_keys={keys}"
    assert (tiny_mapping(pair).global_heads // 2).unique().tolist() == EXPORTED
    for result in serve(pair, ask([LONG, PROMPT], 40), method, fast=True, max_batch=1):
        assert len(result.tokens) == 40
    due = watched.of_slot(0)
    first = due.all(1).nonzero().flatten().tolist()
    assert len(first) == 2 and first[0] == 0
    for begin, end in ((0, first[1]), (first[1], len(due))):
        assert end - begin > TURNS
        for at in range(begin, end - TURNS + 1):
            assert due[at : at + TURNS].any(0).all()
        waiting = due[begin + 1 : end].float().mean(0) < 1
        assert waiting.sum() == LAYERS * KV_HEADS - len(EXPORTED)
        assert (~waiting).nonzero().flatten().tolist() == EXPORTED


@pytest.mark.parametrize("gamma", [1, 4])
def test_tokens_without_scores_are_always_read(watched, pair, gamma):
    """With a draft that is right, so that there are as many of them as there can be."""
    right = Pair(pair.name, pair.target, copy.deepcopy(pair.target), pair.tokenizer)
    method = "specattn:map=global:p=1:draft_p=0.999"
    with engine(right, method, fast=True, gamma=gamma, max_batch=2, max_tokens=600) as served:
        for request in ask([LONG, *RAGGED[:3]], 20 * (gamma + 1)):
            served.submit(request)
        assert len([update for update in served.stream() if update.result]) == 4
        spare = served.speculator.draft.cache.spare_slot
    assert watched.check_newest(spare, gamma) == (TURNS + 1) * (gamma + 1) - 2


@pytest.mark.parametrize("every", [1, 12])
def test_also_those_that_a_dense_pass_took_back(watched, pair, every):
    options = {"lossless": True, "lossless_every": every, "max_tokens": 600}
    with engine(pair, METHOD, fast=True, gamma=4, max_batch=2, **options) as served:
        for request in ask([LONG, *RAGGED[:3]], 60):
            served.submit(request)
        assert len([update for update in served.stream() if update.result]) == 4
        assert watched.check_newest(served.speculator.draft.cache.spare_slot, 4) > 2 * 5, "some had to wait"


@pytest.mark.parametrize("keys", ["none", "int4"])
def test_the_account_is_that_of_the_lists_and_of_the_heads_that_were_scored(watched, pair, keys):
    steps = 4
    with engine(pair, f"{METHOD}:draft_keys={keys}", fast=True, gamma=steps) as served:
        served.submit(ask([LONG], 40)[0])
        list(served.stream())
        runner = served.speculator.draft
        meter, (quantised, *_) = runner.meter, [*runner.cache.stores.values(), None]
    row = meter.geometry.row_bytes
    key = row // 2 if quantised is None else quantised.entry_bytes
    read = 0
    for (_, _, _, counts), (_, seen, due) in zip(watched.lists, watched.due, strict=True):
        read += sum(int((counts[0] - (steps - 1 - step)).sum()) for step in range(steps)) * row
        read += int(due[0].sum()) * seen[0] * key
    assert float(meter.read[0]) == read
    assert not watched.of_slot(0)[1:].all(1).any()


def memory(pair: Pair) -> DraftMemory:
    with engine(pair, METHOD, max_batch=3) as served:
        return DraftMemory(FastModel.of(served.speculator.draft, pair.vocab_size), 64)


def test_what_is_remembered_is_forgotten(pair):
    kept = memory(pair)
    kept.prepare([0, 2], 4)
    kept.scores.fill_(7)
    kept.rounds.fill_(5)
    kept.prepare([0, 2], 4)
    assert (kept.rounds == 5).all() and (kept.scores == 7).all()
    kept.forget([2, 1])
    kept.prepare([0, 2], 4)
    assert kept.rounds.tolist() == [5, 5, 0, 5]
    assert (kept.scores[[0, 1, 3]] == 7).all()
    assert kept.scores[2, :, 0].isinf().all() and not kept.scores[2, :, 1:].any()


def test_all_heads_have_their_turn_where_rounds_become_shorter(pair):
    """Their lists end with fewer tokens than longer rounds may have left without scores."""
    kept = memory(pair)
    for steps, counted in ((4, 0), (6, 3), (6, 3), (5, 0), (5, 3)):
        kept.prepare([1], steps)
        assert kept.rounds[1] == counted
        kept.rounds[1] = 3


def test_nothing_is_left_of_longer_requests(pair):
    with engine(pair, METHOD, fast=True, max_batch=1) as served:
        for request in ask([LONG, RAGGED[0]], 12):
            served.submit(request)
        results = [update.result for update in served.stream() if update.result]
        scores = served.speculator._shared.attended.scores[0]
    end = len(RAGGED[0]) + len(results[1].tokens)
    assert scores.isfinite().all() and scores[:, : len(RAGGED[0])].all()
    assert not scores[:, end + 10 :].any()


@pytest.fixture
def poisoned() -> Callable[[bool], None]:
    """Whether what is allocated and not written is NaN."""
    yield lambda wanted: torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", ["none", "int4"])
def test_no_token_without_a_key_is_read(poisoned, pair, keys):
    found = []
    for wanted in (False, True):
        poisoned(wanted)
        method = f"{METHOD}:draft_keys={keys}"
        found.append(figures(serve(pair, ask([LONG, *RAGGED], 30), method, fast=True, max_batch=3)))
    assert found[0] == found[1]
