"""Rounds whose draft reads its own nucleus, on the fast path with references."""

from __future__ import annotations

import pytest
import torch
from test_fast import make
from test_fast_engine import PROMPT, RAGGED, SAMPLED, figures, serve
from tiny import tiny_mapping

from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.fast.sparse_draft import SparseDraftSteps
from specattn.kernels.echoes import echoes_reference
from specattn.kernels.quantised_keys import encode
from specattn.request import Request
from specattn.sampling import SamplingParams
from specattn.selection.registry import parse_method
from specattn.stores.quantised_keys import QuantisedKeys

LONG = torch.randint(3, 90, (90,), generator=torch.Generator().manual_seed(4)).tolist()


def ask(prompts, count: int, sampling: SamplingParams | None = None) -> list[Request]:
    return [Request(prompt, count, sampling or SamplingParams(), ignore_eos=True) for prompt in prompts]


@pytest.mark.parametrize(
    "method",
    [
        "specattn:p=0.6",
        "specattn:p=0.6:map=global",
        "specattn:p=0.6:every_row=true",
        "specattn:rate=0.2:every_row=true",
    ],
)
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_lists_of_all_that_counts_are_a_dense_draft(sampling, method):
    pair, requests = make("qwen2", layers=4), ask(RAGGED, 25, sampling)
    options = {"fast": True, "max_batch": 3}
    dense = serve(pair, requests, method, **options)
    sparse = serve(pair, requests, f"{method}:draft_p=0.9999999", **options)
    assert [result.tokens for result in sparse] == [result.tokens for result in dense]
    assert [result.accepted_per_round for result in sparse] == [r.accepted_per_round for r in dense]
    reads = pytest.approx([result.kv_read_fraction for result in dense])
    assert [result.kv_read_fraction for result in sparse] == reads


@pytest.mark.parametrize("keys,every_row", [("int8", False), ("int4", False), ("int4", True)])
def test_scores_of_quantised_keys_are_those_of_the_other_path(keys, every_row):
    """It reads everything in each step and makes its scores from the same copy."""
    pair, requests = make("qwen2", layers=4), ask(RAGGED, 25)
    method = f"specattn:p=0.6:draft_p=0.9999999:draft_keys={keys}:every_row={str(every_row).lower()}"
    slow, fast = (serve(pair, requests, method, fast=fast, max_batch=3) for fast in (False, True))
    assert [result.tokens for result in fast] == [result.tokens for result in slow]
    if keys == "int4":
        exact = serve(pair, requests, "specattn:p=0.6", fast=True, max_batch=3)
        assert [r.kv_read_fraction for r in fast] != [r.kv_read_fraction for r in exact], "the copy was read"


@pytest.mark.parametrize("gamma", [3, "auto"])
def test_the_copy_follows_the_keys(gamma):
    """After prompts, rejected tokens, reused slots and rounds of other kinds it is that of the keys, bit for bit."""
    pair = make("qwen3", layers=4)
    mapping = tiny_mapping(pair)
    method = "specattn:p=0.6:draft_p=0.5:draft_keys=int4"
    options = {"fast": True, "gamma": gamma, "mapping": mapping, "max_batch": 2, "max_tokens": 400}
    with Engine(pair, method=method, fallback=True, **options) as engine:
        for request in ask([LONG, *RAGGED], 20):
            engine.submit(request)
        while len(engine._active) < 2 or engine._admission.waiting:
            engine.advance()
        engine.advance()
        draft = engine.speculator.draft
        assert draft is not None
        (store,) = draft.cache.stores.values()
        for slot in (active.slot for active in engine._active.values()):
            # The round under way has written at least what counted before it.
            tokens = torch.arange(draft.cache.length(slot))[None]
            rows = draft.cache.rows(torch.tensor([slot]), tokens)[0]
            for keys, copy in zip(draft.cache.keys, store.layers, strict=True):
                codes, ranges = encode(keys[rows].transpose(0, 1), 4)
                assert torch.equal(copy.codes[:, rows], codes) and torch.equal(copy.ranges[:, rows], ranges)


def test_fewer_bits_are_fewer_bytes():
    pair, requests = make("qwen2", layers=4), ask([LONG], 20)
    read = [
        serve(pair, requests, f"specattn:p=1:draft_p=0.5:draft_keys={keys}", fast=True, max_tokens=600)[0]
        for keys in ("none", "int8", "int4")
    ]
    none, int8, int4 = (result.draft_read_fraction for result in read)
    assert none > int8 > int4


@pytest.mark.parametrize("draft_p", ["0.3", "0.9", "0.9:every_row=true", "0.3:map=global"])
def test_a_target_that_reads_everything_is_not_led_astray(draft_p):
    """Whatever the draft proposes, greedy tokens are the target's."""
    pair, requests = make("llama", layers=4), ask([LONG, PROMPT], 30)
    options = {"fast": True, "max_batch": 2, "max_tokens": 600}
    dense = serve(pair, requests, "dense", **options)
    sparse = serve(pair, requests, f"specattn:p=1:draft_p={draft_p}", **options)
    assert [result.tokens for result in sparse] == [result.tokens for result in dense]


def test_the_draft_reads_less():
    pair, requests = make("qwen3", layers=4), ask([LONG], 40)
    options = {"fast": True, "max_tokens": 600}
    dense, sparse = (serve(pair, requests, f"specattn:p=0.9:draft_p={p}", **options)[0] for p in (1, 0.2))
    # Of four steps' keys and values it reads lists, in which the newest tokens always are, and the keys once.
    assert sparse.draft_read_fraction < 0.8 * dense.draft_read_fraction
    assert sparse.draft_read_fraction > 0.5 * dense.draft_read_fraction / 4


def test_a_step_for_the_last_row_reads_a_list_more():
    """Everything is in the lists: as many bytes as a dense draft's steps, and half of one more for the keys alone."""
    pair, requests = make("qwen3", layers=4), ask([LONG], 40)
    method = "specattn:p=0.9:draft_p={}:every_row=true"
    usual = serve(pair, requests, "specattn:p=0.9", fast=True, max_tokens=600)[0]
    dense, sparse = (
        serve(pair, requests, method.format(p), fast=True, max_tokens=600)[0] for p in (1, 0.9999999)
    )
    assert dense.draft_read_fraction / usual.draft_read_fraction == pytest.approx(5 / 4, rel=0.02)
    assert sparse.draft_read_fraction / dense.draft_read_fraction == pytest.approx(5.5 / 5, rel=0.02)


@pytest.mark.parametrize("mapped", ["heads", "global"])
def test_neighbours_and_reused_slots_change_nothing(mapped):
    pair = make("qwen2", layers=4)
    options = {"fast": True, "max_tokens": 600}
    method = f"specattn:p=0.6:draft_p=0.5:map={mapped}"
    alone = [figures(serve(pair, ask([prompt], 20), method, **options))[0] for prompt in [LONG, *RAGGED]]
    together = figures(serve(pair, ask([LONG, *RAGGED], 20), method, **options, max_batch=3))
    assert together == alone


def test_rounds_of_another_kind_in_between():
    """A draft whose last scores are old starts anew: the same tokens as with lists of everything."""
    pair = make("qwen2", layers=4)
    mixed = serve(pair, ask([PROMPT], 30), "specattn:p=0.6:draft_p=0.9999999", fast=True, gamma="auto")
    assert len(mixed[0].tokens) == 30


def test_the_options_are_checked():
    with pytest.raises(UsageError, match="draft_p=0"):
        parse_method("specattn:draft_p=0")
    with pytest.raises(UsageError, match="draft_keys"):
        parse_method("specattn:draft_keys=int2")


def test_only_a_sparse_draft_has_a_copy():
    assert parse_method("specattn").draft_stores == ()
    assert parse_method("specattn:draft_keys=int8").draft_stores == ()
    assert parse_method("specattn:draft_p=0.9").draft_stores == ()
    assert parse_method("specattn:draft_p=0.9:draft_keys=int8").draft_stores == (QuantisedKeys(8),)


@pytest.fixture
def poisoned_memory():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_read_before_it_is_written(poisoned_memory):
    pair, requests = make("qwen2", layers=4), ask(RAGGED, 25)
    dense, sparse = (
        serve(pair, requests, f"specattn:p=0.6:draft_p={p}", fast=True, max_batch=3) for p in (1, 0.9999999)
    )
    assert [result.tokens for result in sparse] == [result.tokens for result in dense]


@pytest.mark.parametrize("every_row", [False, True])
def test_the_drafts_lists_hold_what_stood_behind_earlier_occurrences(monkeypatch, every_row):
    """Of the pending token, a token a step, in every list; without ``echo`` some of them are missing."""
    found: dict[str, list[bool]] = {}
    whole = SparseDraftSteps.begin

    def watched(self, slots, lengths, echoes=None):
        whole(self, slots, lengths, echoes)
        text = engine.speculator.target.cache.text
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            if length < len(LONG):  # padding
                continue
            text[slot, length] = engine._pipeline.rounds.speculator._shared.requests.table[slot, 3]
            behind = echoes_reference(text, slots.new_tensor([slot]), slots.new_tensor([length]), 1, 2)[0]
            wanted = {at + step for at in behind[behind >= 0].tolist() for step in range(self.rows)}
            for indices, count in zip(self._lists.indices[0], self._lists.counts[0].tolist(), strict=True):
                found[method].append(wanted <= set(indices[:count].tolist()))

    monkeypatch.setattr(SparseDraftSteps, "begin", watched)
    pair = make("qwen2", layers=4)
    text = LONG[:40] * 4
    for echo in (0, 2):
        method = f"specattn:p=0.6:draft_p=0.05:echo={echo}:every_row={str(every_row).lower()}"
        found[method] = []
        with Engine(
            pair, method=method, mapping=tiny_mapping(pair), fast=True, gamma=2, max_tokens=400
        ) as engine:
            engine.submit(Request(text, 30, SamplingParams(), ignore_eos=True))
            list(engine.stream())
    without, with_echoes = found.values()
    assert all(with_echoes) and len(with_echoes) > 8
    assert not all(without), "nothing is missing without echoes: the test shows nothing"
