"""Cycles of the lossless mode on the fast path: the tokens and the account of PyTorch's, read once a cycle."""

from __future__ import annotations

import pytest
import torch
from test_lossless import PROMPT, RAGGED, alone, check_cache, expected, related
from tiny import tiny_mapping

from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.fast.cycles import FastCycles
from specattn.fast.landing import HostLanding
from specattn.fast.sparse_draft import DraftMemory
from specattn.pairs import Pair
from specattn.request import GenerationResult, Request
from specattn.sampling import SamplingParams

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
METHOD = "specattn:p=0.6"
SPARSE_DRAFT = "specattn:p=0.6:draft_p=0.5"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engine(pair: Pair, method: str = METHOD, **options) -> Engine:
    asked = {"lossless": True, "lossless_every": 6, "fast": True, "max_tokens": 400, **options}
    mapping = tiny_mapping(pair) if "specattn" in method else None
    return Engine(pair, method=method, mapping=mapping, **asked)


def serve(requests: list[Request], method: str = METHOD, *, pair: Pair | None = None, **options):
    with engine(pair or related(), method, **options) as served:
        ids = [served.submit(request) for request in requests]
        results = {update.id: update.result for update in served.stream() if update.result}
    return [results[id] for id in ids]


def ask(count: int = 20, sampling: SamplingParams = GREEDY, prompts=RAGGED[:3], **options) -> list[Request]:
    return [Request(prompt, count, sampling, ignore_eos=True, **options) for prompt in prompts]


def figures(results: list[GenerationResult]) -> list[tuple]:
    """All that does not depend on the clock."""
    names = ("tokens", "text", "finish_reason", "rounds", "accepted_per_round", "kv_read_fraction")
    names += ("draft_read_fraction",)
    return [
        (*(approximately(getattr(r, name)) for name in names), r.lossless.dense_passes, r.lossless.accepted)
        for r in results
    ]


def approximately(value):
    return pytest.approx(value) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "method", [METHOD, "specattn:p=0.4:echo=2", "specattn:p=0.6:every_row=true", "specattn:rate=0.2:seed=1"]
)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_requests_come_and_go_as_in_pytorch(sampling, method):
    """More requests than slots, of different lengths: batches are padded, shrink and grow."""
    requests = [
        Request(prompt, count, sampling, ignore_eos=True)
        for prompt, count in zip([*RAGGED[:3], PROMPT[5:9]], (9, 17, 1, 12), strict=True)
    ]
    fast, slow = (serve(requests, method, fast=fast, max_batch=3) for fast in (True, False))
    assert figures(fast) == figures(slow)
    assert any(0 < result.lossless.acceptance_rate < 1 for result in fast)


def test_greedy_and_sampled_requests_of_one_batch():
    requests = [
        Request(RAGGED[0], 12, GREEDY, ignore_eos=True),
        Request(PROMPT, 12, SAMPLED, ignore_eos=True),
    ]
    fast, slow = (serve(requests, fast=fast, max_batch=2) for fast in (True, False))
    assert figures(fast) == figures(slow)


@pytest.mark.parametrize(
    "method", [SPARSE_DRAFT, f"{SPARSE_DRAFT}:every_row=true", f"{SPARSE_DRAFT}:map=global"]
)
@pytest.mark.parametrize("every", [1, 11, "auto"])
def test_the_dense_tokens_with_a_draft_that_reads_lists(every, method):
    results = serve(ask(), method, max_batch=3, lossless_every=every)
    assert [result.tokens for result in results] == expected(RAGGED[:3], 20)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("echo", [0, 2])
def test_self_speculation(drafting, sampling, echo):
    pair = related() if drafting else alone(related())
    requests = ask(17, sampling)
    fast, slow = (
        serve(requests, f"self:p=0.6:sink=1:window=2:echo={echo}", pair=pair, fast=fast, max_batch=3)
        for fast in (True, False)
    )
    assert figures(fast) == figures(slow)
    assert fast[1].kv_read_fraction < 0.95


@pytest.mark.parametrize("every", [5, "auto"])
def test_self_speculation_with_a_draft_that_reads_lists(every):
    results = serve(ask(), "self:p=0.6:draft_p=0.8:echo=1", max_batch=3, lossless_every=every)
    assert [result.tokens for result in results] == expected(RAGGED[:3], 20)
    assert all(result.draft_read_fraction > 0 for result in results)


def test_self_speculation_needs_cycles():
    with pytest.raises(UsageError, match="in the lossless mode only"):
        engine(alone(related()), "self:p=0.9", lossless=False, lossless_every=None)


def test_an_end_token_inside_a_cycle():
    pair = related()
    whole = expected(RAGGED[:2], 20)
    pair.target.generation_config.eos_token_id = whole[1][4]
    try:
        requests = [Request(RAGGED[0], 20, ignore_eos=True), Request(RAGGED[1], 20)]
        longer, ended = serve(requests, lossless_every=9, max_batch=2)
    finally:
        pair.target.generation_config.eos_token_id = 1
    assert longer.tokens == whole[0]
    assert ended.tokens == whole[1][: whole[1].index(whole[1][4]) + 1]
    assert ended.finish_reason == "stop"


def test_the_context_ends_inside_a_cycle():
    """Near it the requests of a batch have PyTorch's cycles, and the device's again behind the one that ended."""
    pair = related("llama", max_positions=96)
    prompts = [(PROMPT * 3)[: pair.context_limit - 5], PROMPT[:20]]
    results = serve(ask(40, prompts=prompts), pair=pair, max_batch=2)
    assert [len(result.tokens) for result in results] == [5, 40]
    assert [result.tokens for result in results] == [
        result.tokens for result in serve(ask(40, prompts=prompts), pair=pair, max_batch=2, fast=False)
    ]


@pytest.mark.parametrize("step", [1, 13])
def test_rows_that_a_request_lacks_change_nothing(step, monkeypatch):
    """Dense passes of another size leave the same in both caches, which is what reading the text densely leaves."""
    monkeypatch.setattr("specattn.fast.cycles.STEP", step)
    with engine(related(), SPARSE_DRAFT, max_batch=2) as served:
        for request in ask(60, prompts=RAGGED[:2]):
            served.submit(request)
        for _ in range(4):
            served.advance()
        speculator = served.speculator
        for active, dense in zip(served._active.values(), expected(RAGGED[:2], 60), strict=True):
            assert active.tokens == dense[: len(active.tokens)]
            check_cache(speculator.target, active.slot, active.text, active.length)
            # What a sparse draft writes is not what a dense one would.
            assert speculator.draft.cache.length(active.slot) == active.length - 1


def test_the_host_reads_once_a_cycle(monkeypatch):
    """All rounds and the dense pass are launched before the first report is looked at."""
    events: list[str] = []
    watch(monkeypatch, HostLanding, events, "launch", "land")
    watch(monkeypatch, FastCycles, events, "enter")
    with engine(related(), max_batch=3, lossless_every=12) as served:
        for request in ask(60):
            served.submit(request)
        cycles = 0
        for _ in range(4):
            served.advance()
            cycles += 1
        rounds = [active.slot for active in served._active.values()]
        assert all(len(served.speculator.account(slot).rounds) > cycles for slot in rounds)
    assert events == ["enter"] + ["launch", "launch", "land", "land"] * cycles


def test_a_sparse_draft_remembers_from_cycle_to_cycle(monkeypatch):
    events: list[str] = []
    watch(monkeypatch, DraftMemory, events, "forget")
    options = {"lossless_every": 4, "max_tokens": 600}
    dense, sparse = (
        serve(ask(40, prompts=[PROMPT * 4]), f"specattn:p=0.9:draft_p={p}", **options)[0] for p in (1, 0.2)
    )
    assert sparse.lossless.dense_passes > 4 and events.count("forget") <= 1
    assert sparse.draft_read_fraction < 0.8 * dense.draft_read_fraction


def watch(monkeypatch, owner: type, events: list[str], *names: str) -> None:
    """Note every call of these methods in ``events``."""

    def noted(name: str, whole):
        def method(self, *arguments):
            events.append(name)
            return whole(self, *arguments)

        return method

    for name in names:
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
