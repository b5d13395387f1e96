"""The engine on the fast path: what it gives on the other, token for token, with rounds that overlap the host."""

from __future__ import annotations

import pytest
import torch
from test_fast import make
from tiny import tiny_mapping, tiny_model, tiny_pair

from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.fast.speculator import FastSpeculator
from specattn.pairs import Pair
from specattn.request import GenerationResult, Request
from specattn.sampling import SamplingParams

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
RAGGED = [PROMPT[:7], PROMPT, PROMPT[3:20], PROMPT[10:39], PROMPT[5:9]]
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
METHODS = [
    "dense",
    "specattn:p=0.6",
    "specattn:p=0.6:every_row=true",
    "specattn:p=0.4:echo=2",
    "specattn:rate=0.2:power=0.8",
]


def engine(pair: Pair, method: str = "dense", **options) -> Engine:
    mapping = tiny_mapping(pair) if method.startswith("specattn") else None
    return Engine(pair, method=method, mapping=mapping, **{"max_tokens": 400, **options})


def serve(pair: Pair, requests: list[Request], method: str = "dense", **options) -> list[GenerationResult]:
    """Results in the order of the requests, from an engine whose pages are all free again."""
    with engine(pair, method, **options) as served:
        ids = [served.submit(request) for request in requests]
        results = {update.id: update.result for update in served.stream() if update.result}
        runners = [served.speculator.target, served.speculator.draft]
        assert [runner.cache.used_bytes for runner in runners if runner is not None] == [0] * len(pair.models)
    return [results[id] for id in ids]


def figures(results: list[GenerationResult]) -> list[tuple]:
    """All that does not depend on the clock."""
    names = ("text", "tokens", "finish_reason", "rounds", "accepted_per_round", "acceptance_rate")
    reads = ("kv_read_fraction", "draft_read_fraction")
    return [
        (*(getattr(r, name) for name in names), *(pytest.approx(getattr(r, name)) for name in reads))
        for r in results
    ]


def assert_equal_on_both_paths(pair: Pair, requests: list[Request], method: str, **options):
    slow, fast = (serve(pair, requests, method, fast=fast, **options) for fast in (False, True))
    assert figures(fast) == figures(slow)
    return fast


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_requests_come_and_go(method, sampling):
    """More requests than slots, of different lengths: batches shrink and grow between rounds."""
    counts = [9, 25, 1, 14, 30]
    requests = [
        Request(prompt, count, sampling, ignore_eos=True)
        for prompt, count in zip(RAGGED, counts, strict=True)
    ]
    results = assert_equal_on_both_paths(make("qwen2", layers=4), requests, method, max_batch=3)
    assert [len(result.tokens) for result in results] == counts


def test_a_request_that_comes_later():
    pair, results = make("llama"), []
    for fast in (False, True):
        with engine(pair, "specattn:p=0.6", fast=fast, max_batch=4, gamma=2) as served:
            served.submit(Request(PROMPT, 30, ignore_eos=True))
            updates = [update for _ in range(4) for update in served.advance()]
            served.submit(Request(RAGGED[2], 8, SAMPLED, ignore_eos=True))
            updates += list(served.stream())
        results.append(figures([u.result for u in sorted(updates, key=lambda u: u.id) if u.result]))
    assert results[0] == results[1]


def test_plain_decoding():
    pair = make("qwen3")
    plain = Pair(pair.name, pair.target, None, pair.tokenizer)
    (result,) = assert_equal_on_both_paths(plain, [Request(PROMPT, 12, ignore_eos=True)], "dense")
    assert result.rounds == 11 and result.draft_read_fraction == 0


def test_an_end_token_inside_a_round():
    pair = make("llama")
    (whole,) = serve(pair, [Request(PROMPT, 24, ignore_eos=True)])
    pair.target.generation_config.eos_token_id = [whole.tokens[7], 95]
    requests = [Request(PROMPT, 24), Request(RAGGED[0], 24, ignore_eos=True)]
    first, _ = assert_equal_on_both_paths(pair, requests, "specattn:p=0.9", max_batch=2)
    assert first.finish_reason == "stop" and len(first.tokens) <= 8


def test_a_stop_string_inside_a_round():
    pair = make("llama")
    (whole,) = serve(pair, [Request(PROMPT, 24, ignore_eos=True)])
    requests = [Request(PROMPT, 24, stop=(whole.text[9:13],), ignore_eos=True)]
    (result,) = assert_equal_on_both_paths(pair, requests, "dense")
    assert result.text == whole.text[: whole.text.index(whole.text[9:13])]


@pytest.mark.parametrize("gamma", [1, 4])
def test_the_context_limit(gamma):
    pair = make("llama", max_positions=64)
    requests = [Request((PROMPT * 2)[:58], 40, SAMPLED), Request(PROMPT[:20], 50, SAMPLED)]
    near, far = assert_equal_on_both_paths(pair, requests, "specattn:p=0.6", gamma=gamma, max_batch=2)
    assert (near.finish_reason, far.finish_reason) == ("length", "length")
    assert (len(near.tokens), len(far.tokens)) == (6, 44)


def test_a_cancelled_request_keeps_what_it_produced_and_its_slot_serves_another():
    pair = make("llama")
    whole, other = serve(pair, [Request(PROMPT, 40, ignore_eos=True), Request(RAGGED[2], 9, ignore_eos=True)])
    with engine(pair, fast=True, max_tokens=100) as served:
        id = served.submit(Request(PROMPT, 40, ignore_eos=True))
        later = served.submit(Request(RAGGED[2], 9, ignore_eos=True))
        for _ in range(4):
            served.advance()
        result = served.cancel(id)
        rest = [update.result for update in served.stream() if update.id == later and update.result]
        assert served.idle
    assert result.finish_reason == "interrupted"
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert result.rounds == 3, "the fourth round was under way"
    assert figures(rest) == figures([other])


def test_a_round_is_launched_before_the_last_one_has_landed():
    with engine(make("llama"), fast=True) as served:
        served.submit(Request(PROMPT, 40, ignore_eos=True))
        counts = [len(update.tokens) for _ in range(3) for update in served.advance()]
        assert len(counts) == 3 and counts[0] == 1, "the prompt's token, then two rounds of three"
        (active,) = served._active.values()
        assert len(active.accepted) == 2


def test_a_round_too_many_counts_for_nobody():
    """The end token is a surprise: the round behind it was under way, and had read its share."""
    pair = make("llama")
    (whole,) = serve(pair, [Request(PROMPT, 40, ignore_eos=True)])
    pair.target.generation_config.eos_token_id = [whole.tokens[20]]
    with engine(pair, fast=True) as served:
        served.submit(Request(PROMPT, 40))
        (result,) = [update.result for update in served.stream() if update.result]
        meter = served.speculator.target.meter
        assert float(meter.full[0]) > 0
    (slow,) = serve(pair, [Request(PROMPT, 40)], fast=False)
    assert figures([result]) == figures([slow])


@pytest.mark.parametrize(
    "model_type,method,reason",
    [("gemma3_text", "dense", "not gemma3_text"), ("llama", "oracle:p=0.9", "has no fast path yet")],
)
def test_what_cannot_take_the_fast_path_says_why(model_type, method, reason, monkeypatch):
    pair = tiny_pair(model_type)
    monkeypatch.setattr("specattn.engine.ModelRunner", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=reason):
        engine(pair, method, fast=True)
    monkeypatch.undo()
    for fast in (None, False):
        assert engine(pair, method, fast=fast).path.name == "torch"
    assert reason in engine(pair, method).path.reason


def test_on_a_cpu_the_engine_takes_the_other_path_unless_told():
    pair = Pair("own", tiny_model("llama"), None, tiny_pair("llama").tokenizer)
    path = engine(pair).path
    assert not path.fast and "GPU" in path.reason
    assert engine(pair, fast=True).path.fast


def test_prepared_rounds_are_not_made_while_requests_wait(monkeypatch):
    built = []
    build = FastSpeculator._build

    def counted(self, batch, gamma, sampling):
        built.append((batch, gamma))
        return build(self, batch, gamma, sampling)

    monkeypatch.setattr(FastSpeculator, "_build", counted)
    options = {"fast": True, "gamma": "auto", "fallback": True, "max_batch": 3}
    method = "specattn:p=0.6:draft_p=0.8"
    with engine(pair := tiny_pair("llama"), method, **options) as served:
        served.prepare()
        assert {batch for batch, _ in built} == {1, 2, 4}
        assert len(built) == len(set(served.policy.plans)) * 3
        ready = len(built)
        for prompt in (PROMPT, PROMPT[:9], PROMPT[3:20]):
            served.submit(Request(prompt, 20, ignore_eos=True))
        results = [update.result for update in served.stream() if update.result]
    assert len(results) == 3 and len(built) == ready
    with engine(pair, fast=False) as slow:
        slow.prepare([1])
    assert len(built) == ready, "there is nothing to prepare in PyTorch"
