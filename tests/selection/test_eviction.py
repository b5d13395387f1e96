"""Evicting methods in the engine: rounds, batches, memory that others get, and what is counted."""

from __future__ import annotations

import pytest
import torch
from eviction_papers import Forgetful, H2OReading, snapkv
from tiny import tiny_pair

from specattn.dropin import sparse_attention
from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.request import GenerationResult, Request
from specattn.selection.eviction import Evicting
from specattn.selection.registry import METHODS, get_method, method_class, parse_method

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
RAGGED = [PROMPT[:7], PROMPT, PROMPT[3:20], PROMPT[10:39]]
EVICTING = ["snapkv:budget=12:window=4", "h2o:budget=12:every=1", "h2o:budget=0.4:every=3"]
COUNT = 14


def run(pair: Pair, prompts, method: str, **options) -> list[GenerationResult]:
    options = {"max_new_tokens": COUNT, "ignore_eos": True, **options}
    return generate(pair, prompts, method=method, **options)


def alone(pair: Pair) -> Pair:
    """The target without its draft."""
    return Pair(pair.name, pair.target, None, pair.tokenizer)


def rounds_of(result: GenerationResult) -> list[int]:
    """Rows of each round that stand; the last round is cut to the tokens that were asked for."""
    rounds, left = [], len(result.tokens) - 1
    for accepted in result.accepted_per_round:
        rounds.append(min(accepted + 1, left))
        left -= rounds[-1]
    assert left == 0
    return rounds


@pytest.mark.parametrize("method", EVICTING)
@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_decoding_is_that_of_a_model_that_forgets(method, gamma):
    pair = tiny_pair("llama")
    (result,) = run(pair, [PROMPT], method, gamma=gamma)
    tokens, options = PROMPT + result.tokens, parse_method(method)
    if method.startswith("h2o"):
        reading = H2OReading(pair.target, options.budget, options.heavy, options.every)
        logits = reading.read(tokens[:-1], len(PROMPT), rounds_of(result))
    else:
        kept = snapkv(pair.target, PROMPT, budget=12, window=4, kernel=7, pooling="max", gqa="mean")
        reference = Forgetful(pair.target, tokens[:-1])
        reference.see(len(PROMPT), COUNT - 1, kept)
        logits = reference.run(len(tokens) - 1)[0]
    assert result.tokens == logits[len(PROMPT) - 1 :].argmax(-1).tolist()
    assert result.tokens != run(pair, [PROMPT], "dense")[0].tokens


def test_snapkv_decodes_the_same_with_and_without_a_draft():
    pair = tiny_pair("qwen2")
    (speculative,), (plain,) = (run(p, [PROMPT], EVICTING[0]) for p in (pair, alone(pair)))
    assert speculative.tokens == plain.tokens
    assert len(speculative.accepted_per_round) <= len(plain.accepted_per_round) == COUNT - 1


@pytest.mark.parametrize(
    ("method", "model_type"), [*((method, "qwen2") for method in EVICTING), (EVICTING[1], "gemma3_text")]
)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(method, model_type):
    pair = tiny_pair(model_type)
    together = run(pair, RAGGED, method)
    in_turn = run(pair, RAGGED, method, max_batch=2)
    for prompt, result, later in zip(RAGGED, together, in_turn, strict=True):
        (single,) = run(pair, [prompt], method)
        assert result.tokens == later.tokens == single.tokens
        assert result.accepted_per_round == single.accepted_per_round
        assert result.kv_read_fraction == pytest.approx(single.kv_read_fraction)


@pytest.mark.parametrize("method", ["snapkv:budget=1.0", "snapkv:budget=40", "h2o:budget=1", "h2o:budget=70"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_full_budget_is_dense_token_for_token(method, model_type):
    pair = tiny_pair(model_type)
    (result,), (dense,) = (run(pair, [PROMPT], name) for name in (method, "dense"))
    assert result.tokens == dense.tokens
    assert result.accepted_per_round == dense.accepted_per_round


def test_reads_are_over_the_whole_text():
    """Plain decoding: row i of the answer stands behind 40 + i tokens, of which 28 were dropped."""
    pair = alone(tiny_pair("llama"))
    (result,) = run(pair, [PROMPT], "snapkv:budget=12:window=4")
    full = [len(PROMPT) + i + 1 for i in range(COUNT - 1)]
    assert result.kv_read_fraction == pytest.approx(sum(n - 28 for n in full) / sum(full))
    (result,) = run(pair, [PROMPT], "h2o:budget=12:every=1")
    token = 2 * 16 * 4  # key and value in float32, beside which the score is read
    assert result.kv_read_fraction == pytest.approx(13 * len(full) / sum(full) * (token + 4) / token)


def test_sliding_windows_are_never_cut():
    """The tiny model has windows of 16 tokens; a smaller budget is raised to that."""
    pair = alone(tiny_pair("gemma3_text"))
    with Engine(pair, method="snapkv:budget=5:window=3", max_tokens=100) as engine:
        engine.submit(Request(PROMPT, max_new_tokens=COUNT))
        engine.advance()
        assert engine.speculator.target.cache.length(0) == 16 + 1


# Memory


def test_dropped_tokens_make_room_for_waiting_requests():
    """The cache has room for one request of 40 + 60 tokens, and after its eviction for another."""
    pair = alone(tiny_pair("llama"))
    requests = [Request(prompt, max_new_tokens=60, ignore_eos=True) for prompt in (PROMPT, PROMPT[:20])]
    served = {}
    for method in ("dense", "snapkv:budget=12:window=4"):
        with Engine(pair, method=method, max_batch=2, max_tokens=150) as engine:
            ids = [engine.submit(request) for request in requests]
            engine.advance()
            cache = engine.speculator.target.cache
            served[method] = len(engine._active)
            if method != "dense":
                # 12 tokens of the first are left, 60 may follow; all 20 of the second fit the budget of a fifth.
                tokens = [12 + 60 + engine._admission.slack] * 2
                pages = sum(cache.pages_for(count) for count in tokens)
                assert cache.used_bytes == pages * cache.page_size * cache.geometry.token_bytes
            results = {update.id: update.result for update in engine.stream() if update.result}
            assert cache.used_bytes == 0
        for id, request in zip(ids, requests, strict=True):
            (single,) = run(pair, [request.prompt], method, max_new_tokens=60)
            assert results[id].tokens == single.tokens
    assert served == {"dense": 1, "snapkv:budget=12:window=4": 2}


def test_a_request_waits_until_the_draft_has_room_too():
    """The draft forgets nothing."""
    pair = tiny_pair("llama")
    with Engine(pair, method="snapkv:budget=12:window=4", max_batch=2, max_tokens=150) as engine:
        for prompt in (PROMPT, PROMPT[:20]):
            engine.submit(Request(prompt, max_new_tokens=60, ignore_eos=True))
        engine.advance()
        assert len(engine._active) == 1
        results = [update.result for update in engine.stream() if update.result]
    assert [result.finish_reason for result in results] == ["length", "length"]


def test_h2o_goes_on_giving_pages_back():
    pair = alone(tiny_pair("llama"))
    with Engine(pair, method="h2o:budget=16:every=1", max_tokens=140) as engine:
        engine.submit(Request(PROMPT, max_new_tokens=100, ignore_eos=True))
        used = []
        while not engine.idle:
            engine.advance()
            used.append(engine.speculator.target.cache.used_bytes)
    assert used == sorted(used, reverse=True)
    page = 16 * engine.speculator.target.geometry.token_bytes
    # After the prefill 16 tokens are left and 100 and the slack may come; at the end, next to none.
    assert used[0] == 8 * page
    assert used[-2] == 2 * page
    assert used[-1] == 0


# Refusals


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_the_dropin_refuses_and_names_the_alternative(name):
    model = tiny_pair("llama").target
    with pytest.raises(UsageError, match=f"{name}.* use specattn.generate"), sparse_attention(model, name):
        pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrapper", ["twilight", "vattention"])
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_wrappers_refuse_them_and_name_what_they_can_wrap(wrapper, name):
    with pytest.raises(UsageError, match=rf"{wrapper}: base={name}.* plain lists .*specattn"):
        parse_method(f"{wrapper}:base={name}")


def test_evicting_methods_are_dense_in_what_is_left():
    evicting = [name for name in METHODS if issubclass(method_class(name), Evicting)]
    assert evicting == ["h2o", "snapkv"]
    for name in evicting:
        assert all(get_method(name).is_dense(layer) for layer in range(4))


def test_h2o_needs_all_of_the_prompts_attention():
    pair = tiny_pair("llama")
    with pytest.raises(UsageError, match=r"'h2o' adds up .* prefill 'sparge' leaves"):
        generate(pair, [PROMPT], method="h2o", prefill="sparge", max_new_tokens=2)
    (result,) = generate(pair, [PROMPT], method="snapkv", prefill="sparge", max_new_tokens=2, ignore_eos=True)
    assert len(result.tokens) == 2
