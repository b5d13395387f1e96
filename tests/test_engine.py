"""Requests through the engine: what comes out, when it ends, and what is left behind."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import MODEL_TYPES, tiny_mapping, tiny_pair

from specattn.byte_model import ByteModel, Footprint
from specattn.engine import Engine
from specattn.errors import CacheFullError, UsageError
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.plan import Plan
from specattn.request import Request
from specattn.sampling import SamplingParams

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
RAGGED = [PROMPT[:7], PROMPT, PROMPT[3:20], PROMPT[10:39]]
METHODS = [
    "dense",
    "streaming:budget=0.3",
    "oracle:p=0.7",
    "specattn:p=0.6",
    "specattn-paper:p=0.6",
    "quest:budget=0.3:page=4",
    "twilight:base=(quest:budget=0.5:page=4):p=0.7",
    "twilight:base=full:p=0.6",
    "twilight:base=(specattn:p=0.9):p=0.7",
]
FULL = [
    "specattn:p=1",
    "specattn-paper:p=1",
    "oracle:p=1",
    "streaming:budget=1",
    "quest:budget=1",
    "twilight:base=full:p=1",
    "twilight:base=(quest:budget=1):p=1",
    "twilight:base=(specattn:p=1):p=1",
]


def transformers_greedy(pair: Pair, prompt: list[int], count: int) -> list[int]:
    output = pair.target.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def run(pair: Pair, prompts, method="dense", count=24, **options):
    options.setdefault("ignore_eos", True)
    mapping = tiny_mapping(pair) if "specattn" in method else None
    return generate(pair, prompts, method=method, mapping=mapping, max_new_tokens=count, **options)


def own_draft(pair: Pair) -> Pair:
    """The target as its own draft: every token is accepted."""
    return Pair(pair.name, pair.target, pair.target, pair.tokenizer)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("gamma", [1, 4])
def test_dense_greedy_equals_transformers_token_for_token(model_type, gamma):
    pair = tiny_pair(model_type)
    (result,) = run(pair, [PROMPT], gamma=gamma)
    assert result.tokens == transformers_greedy(pair, PROMPT, 24)
    assert result.kv_read_fraction == 1.0
    assert result.finish_reason == "length"


def test_a_perfect_draft_is_accepted_whole():
    pair = own_draft(tiny_pair("llama"))
    (result,) = run(pair, [PROMPT], gamma=4, count=21)
    assert result.tokens == transformers_greedy(pair, PROMPT, 21)
    assert result.accepted_per_round == [4, 4, 4, 4]
    assert result.acceptance_rate == 1.0


def test_plain_decoding_without_a_draft():
    pair = tiny_pair("qwen3")
    plain = Pair(pair.name, pair.target, None, pair.tokenizer)
    (result,) = run(plain, [PROMPT])
    assert result.tokens == transformers_greedy(pair, PROMPT, 24)
    assert result.accepted_per_round == [0] * 23
    assert result.draft_read_fraction == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(method):
    pair = tiny_pair("qwen2")
    together = run(pair, RAGGED, method)
    for prompt, result in zip(RAGGED, together, strict=True):
        (alone,) = run(pair, [prompt], method)
        assert result.tokens == alone.tokens
        assert result.accepted_per_round == alone.accepted_per_round
        assert result.kv_read_fraction == pytest.approx(alone.kv_read_fraction)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_full_selection_equals_dense_token_for_token(method, model_type):
    pair = tiny_pair(model_type)
    (result,) = run(pair, [PROMPT], method)
    assert result.tokens == transformers_greedy(pair, PROMPT, 24)
    assert result.kv_read_fraction == 1.0


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_sparse_method_reads_less(method):
    (result,) = run(tiny_pair("llama"), [PROMPT], method, count=40)
    assert 0.3 < result.kv_read_fraction < 0.99
    assert result.draft_read_fraction > 0


def test_requests_wait_for_room_and_all_are_served():
    pair = tiny_pair("llama")
    results = run(pair, RAGGED, max_batch=2)
    assert [r.tokens for r in results] == [run(pair, [prompt])[0].tokens for prompt in RAGGED]


def test_rejected_tokens_leave_no_trace_in_either_cache():
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", gamma=4, max_tokens=200) as engine:
        engine.submit(Request(PROMPT, max_new_tokens=30, ignore_eos=True))
        for _ in range(6):
            engine.advance()
        (active,) = engine._active.values()
        assert sum(active.accepted) < 4 * len(active.accepted)
        tokens = PROMPT + active.tokens
        speculator = engine.speculator
        for runner, length in ((speculator.target, active.length), (speculator.draft, active.length - 1)):
            assert runner.cache.length(active.slot) == length
            fresh = type(runner)(runner.model, tokens=200, slots=1)
            slot = fresh.cache.allocate(length)
            fresh.prefill(slot, tokens[:length])
            for layer in range(runner.geometry.layers):
                for ours, clean in zip(
                    runner.cache.segments(layer, active.slot, 0, length)[0],
                    fresh.cache.segments(layer, slot, 0, length)[0],
                    strict=True,
                ):
                    assert torch.allclose(ours, clean, atol=1e-4)


def test_pages_are_given_back():
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", max_batch=2, max_tokens=200) as engine:
        for prompt in RAGGED:
            engine.submit(Request(prompt, max_new_tokens=9))
        assert len([u for u in engine.stream() if u.result]) == 4
        assert engine.speculator.target.cache.used_bytes == engine.speculator.draft.cache.used_bytes == 0


def test_an_end_token_inside_a_round_ends_the_request():
    pair = own_draft(tiny_pair("llama"))
    expected = transformers_greedy(pair, PROMPT, 24)
    pair.target.generation_config.eos_token_id = [expected[7], 95]
    first = next(number for number, token in enumerate(expected) if token in pair.eos_token_ids)
    (result,) = run(pair, [PROMPT], ignore_eos=False)
    assert result.tokens == expected[: first + 1]
    assert first < 23
    assert result.finish_reason == "stop"


def test_a_stop_string_inside_a_round_is_cut_off():
    pair = own_draft(tiny_pair("llama"))
    whole = run(pair, [PROMPT])[0]
    stop = whole.text[9:13]
    seen: list[str] = []
    (result,) = run(pair, [PROMPT], stop=[stop, "never"], on_text=lambda number, text: seen.append(text))
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert "".join(seen) == result.text
    assert len(result.tokens) < len(whole.tokens)


def test_streamed_text_is_the_whole_text():
    pair = tiny_pair("llama")
    pieces: dict[int, str] = {}
    results = run(
        pair, RAGGED, on_text=lambda number, text: pieces.update({number: pieces.get(number, "") + text})
    )
    assert [pieces[number] for number in range(4)] == [result.text for result in results]


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
def test_generation_stops_at_the_context_limit(gamma):
    pair = tiny_pair("llama", max_positions=64)
    limit = pair.context_limit
    prompts = [(PROMPT * 2)[: limit - 6], PROMPT[:20]]
    near, far = run(pair, prompts, gamma=gamma, count=40)
    assert len(near.tokens) == 6
    assert near.finish_reason == "length"
    assert near.tokens == transformers_greedy(pair, prompts[0], 6)
    assert far.tokens == transformers_greedy(pair, prompts[1], 40)


@pytest.mark.parametrize("method", ["specattn:p=0.6:signals=both", "h2o:budget=30:every=1"])
def test_a_method_that_remembers_its_rounds_runs_those_at_the_context_limit(method):
    pair = tiny_pair("llama", max_positions=64)
    results = run(pair, [(PROMPT * 2)[:58], PROMPT[:20]], method, gamma="auto", count=40)
    assert [len(result.tokens) for result in results] == [6, 40]


def test_a_prompt_of_one_token():
    pair = tiny_pair("qwen2")
    assert run(pair, [PROMPT[:1]])[0].tokens == transformers_greedy(pair, PROMPT[:1], 24)


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    pair = tiny_pair("llama")
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 20}
    first, second = (run(pair, RAGGED, seed=3, **options) for _ in range(2))
    assert [r.tokens for r in first] == [r.tokens for r in second]
    assert [r.tokens for r in run(pair, RAGGED, seed=4, **options)] != [r.tokens for r in first]
    (alone,) = run(pair, RAGGED[1:2], seed=4, **options)
    assert alone.tokens == first[1].tokens  # prompt 1 of the batch drew with seed 3 + 1


def by_bytes_alone(engine: Engine, draft_weights: int) -> Engine:
    """An engine whose rounds take as long as their bytes do, with a draft of so many of them."""
    policy = engine.policy
    policy.model = ByteModel(Footprint(1000, 0), Footprint(draft_weights, 0))
    observe = policy.observe
    policy.observe = lambda plan, size, seconds: observe(plan, size, policy.model.nbytes(plan, 0) * 1e-6)
    return engine


def test_auto_gamma_learns_from_what_is_accepted():
    pair = tiny_pair("llama")
    with by_bytes_alone(Engine(own_draft(pair), method="dense", gamma="auto", max_tokens=300), 100) as engine:
        engine.submit(Request(PROMPT, max_new_tokens=150, ignore_eos=True))
        results = [update.result for update in engine.stream() if update.result]
    assert max(results[0].accepted_per_round) == engine.policy.largest_gamma
    with by_bytes_alone(Engine(pair, method="dense", gamma="auto", max_tokens=300), 900) as engine:
        engine.submit(Request(PROMPT, max_new_tokens=100, ignore_eos=True))
        (plain,) = [update.result for update in engine.stream() if update.result]
        assert engine.policy.report()["rounds"]["dense, no draft"] > 50
    assert plain.tokens == transformers_greedy(pair, PROMPT, 100)


@pytest.mark.parametrize("fast", [False, True])
def test_the_draft_catches_up_after_rounds_without_it(fast):
    """Whatever is chosen, dense rounds give the target's tokens, and a perfect draft is accepted whole."""
    pair = own_draft(tiny_pair("llama"))
    plans = itertools.cycle([Plan(4, False), Plan(0, False), Plan(0, False), Plan(2, False)])
    with Engine(pair, method="dense", gamma="auto", fast=fast, max_tokens=300, max_batch=2) as engine:
        engine.policy.choose = lambda size: next(plans)
        ids = [engine.submit(Request(prompt, 60, ignore_eos=True)) for prompt in RAGGED[:2]]
        results = {update.id: update.result for update in engine.stream() if update.result}
    for id, prompt in zip(ids, RAGGED, strict=False):
        assert results[id].tokens == transformers_greedy(pair, prompt, 60)
        assert results[id].accepted_per_round[:8] == [4, 0, 0, 2] * 2


@pytest.mark.parametrize(
    "method,fast", [("specattn:p=0.3", False), ("specattn:p=0.3", True), ("quest:budget=0.2:page=4", False)]
)
def test_a_fallback_reads_everything(method, fast):
    pair = tiny_pair("llama")
    options = {"method": method, "mapping": tiny_mapping(pair), "fast": fast, "max_tokens": 300}
    with Engine(pair, fallback=True, **options) as engine:
        engine.policy.choose = lambda size: Plan(4, False)
        engine.submit(Request(PROMPT, max_new_tokens=24, ignore_eos=True))
        (result,) = [update.result for update in engine.stream() if update.result]
    assert result.tokens == transformers_greedy(pair, PROMPT, 24)
    assert result.kv_read_fraction == 1.0 and result.accepted_per_round


def test_a_failing_request_frees_its_pages_and_leaves_the_others_running(monkeypatch):
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", max_batch=3, max_tokens=300) as engine:
        runner = engine.speculator.draft
        real = runner.prefill

        def failing(slot, tokens, **options):
            if len(tokens) == len(RAGGED[2]):
                raise RuntimeError("out of memory, on purpose")
            return real(slot, tokens, **options)

        monkeypatch.setattr(runner, "prefill", failing)
        ids = [engine.submit(Request(prompt, max_new_tokens=12, ignore_eos=True)) for prompt in RAGGED]
        results = {update.id: update.result for update in engine.stream() if update.result}
        assert engine.speculator.target.cache.used_bytes == 0
    failed = results[ids[2]]
    assert failed.finish_reason == "error"
    assert "on purpose" in failed.error
    for number in (0, 1, 3):
        assert results[ids[number]].tokens == transformers_greedy(pair, RAGGED[number], 12)


def test_a_round_without_memory_names_what_needs_less(monkeypatch):
    with Engine(tiny_pair("llama"), method="dense", max_batch=2, max_tokens=200) as engine:
        for _ in range(2):
            engine.submit(Request(PROMPT, max_new_tokens=20))

        def launch(*_: object) -> None:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\nmore to say"
            )

        monkeypatch.setattr(engine._rounds, "launch", launch)
        wanted = r"2 requests of up to 4\d tokens: CUDA out of memory. Tried to allocate 2 GiB. Serve fewer"
        with pytest.raises(CacheFullError, match=wanted):
            list(engine.stream())


def test_a_prompt_without_memory_leaves_the_others_running(monkeypatch):
    with Engine(tiny_pair("llama"), method="dense", max_batch=2, max_tokens=200) as engine:
        admission = engine._admission
        read = admission.read

        def first_fails(active):
            monkeypatch.setattr(admission, "read", read)
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\nmore to say"
            )

        monkeypatch.setattr(admission, "read", first_fails)
        ids = [engine.submit(Request(PROMPT, 5, ignore_eos=True)) for _ in range(2)]
        results = {update.id: update.result for update in engine.stream() if update.result}
    assert results[ids[0]].error == "CUDA out of memory. Tried to allocate 2 GiB"
    assert len(results[ids[1]].tokens) == 5 and results[ids[1]].error is None


def test_a_cancelled_request_keeps_what_it_produced():
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", max_tokens=200) as engine:
        id = engine.submit(Request(PROMPT, max_new_tokens=50, ignore_eos=True))
        other = engine.submit(Request(PROMPT, max_new_tokens=5, ignore_eos=True))
        for _ in range(3):
            engine.advance()
        result = engine.cancel(id)
        assert result.finish_reason == "interrupted"
        assert engine.cancel(other) is None
        assert engine.idle
        assert engine.speculator.target.cache.used_bytes == 0
    assert result.tokens == transformers_greedy(pair, PROMPT, len(result.tokens))


def test_attention_is_restored_after_generation_and_after_an_error(monkeypatch):
    pair = tiny_pair("llama")
    before = pair.target.config._attn_implementation
    run(pair, [PROMPT], count=3)
    assert pair.target.config._attn_implementation == before
    monkeypatch.setattr(Engine, "advance", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pair, [PROMPT], count=3)
    assert pair.draft.config._attn_implementation == before


@pytest.mark.parametrize(
    "options,message",
    [
        ({"gamma": 0}, "gamma=0"),
        ({"gamma": "many"}, "gamma='many'"),
        ({"count": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop string is empty"),
        ({"method": "speckattn"}, "did you mean 'specattn'"),
        ({"method": "streaming:p=1"}, "no option 'p'"),
        ({"method": "oracle:p=1.5"}, r"outside \(0, 1\]"),
    ],
)
def test_bad_input_is_refused_by_name_before_any_work(options, message, monkeypatch):
    pair = tiny_pair("llama")
    monkeypatch.setattr(type(pair.target), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=message):
        generate(pair, [PROMPT], **{"method": "dense", "max_new_tokens": options.pop("count", 5), **options})


def test_prompts_that_cannot_be_served_are_refused():
    pair = tiny_pair("llama", max_positions=64)
    with pytest.raises(UsageError, match="prompt is empty"):
        run(pair, [[]])
    for strange in (96, -1):
        with pytest.raises(UsageError, match=rf"{strange}.* the models know 0 to 95"):
            run(pair, [[5, strange]])
    with pytest.raises(UsageError, match="no prompt"):
        run(pair, [])
    with pytest.raises(UsageError, match=r"64 tokens and the models' context ends at 64"):
        run(pair, [(PROMPT * 2)[:64]])


def test_methods_that_need_a_draft_or_a_mapping_say_so():
    pair = tiny_pair("llama")
    with pytest.raises(UsageError, match="specattn calibrate"):
        generate(pair, [PROMPT], method="specattn")
    with pytest.raises(UsageError, match="there is no draft"):
        generate(Pair("x", pair.target, None, pair.tokenizer), [PROMPT], method="specattn")
    other = tiny_mapping(tiny_pair("qwen3", layers=4))
    with pytest.raises(UsageError, match="calibrate"):
        generate(pair, [PROMPT], method="specattn", mapping=other)


def test_a_longest_request_makes_tables_no_longer():
    """Buffers of the fast path are as long as a table: a batch of short requests must not pay for one of all tokens."""
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", max_batch=4, max_tokens=240, max_length=60, fast=True) as engine:
        cache = engine.speculator.target.cache
        assert 60 <= cache.block_table.shape[1] * cache.page_size < 100
        with pytest.raises(CacheFullError, match="max_length"):
            engine.submit(Request(PROMPT, max_new_tokens=90, sampling=SamplingParams()))
        for number in range(4):
            engine.submit(Request(PROMPT[number:], 9, SamplingParams(), ignore_eos=True))
        lengths = [len(update.result.tokens) for update in engine.stream() if update.result]
    assert lengths == [9] * 4
    with Engine(pair, method="dense", max_tokens=10**5) as engine:
        cache = engine.speculator.target.cache
        assert cache.block_table.shape[1] * cache.page_size < pair.context_limit + 64


def test_a_request_larger_than_the_engine_is_refused():
    pair = tiny_pair("llama")
    with Engine(pair, method="dense", max_tokens=30) as engine:
        with pytest.raises(CacheFullError, match="larger max_tokens"):
            engine.submit(Request(PROMPT, max_new_tokens=20, sampling=SamplingParams()))
        assert engine.idle
