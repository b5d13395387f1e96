"""The lossless mode: sparse rounds run ahead, and what comes out is what the dense target chooses."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tiny import MODEL_TYPES, tiny_mapping, tiny_model, tiny_pair, tiny_tokenizer

from specattn.acceptance import verify
from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.every import EveryPolicy
from specattn.gamma import GAMMAS
from specattn.generation import generate
from specattn.lossless import LosslessSpeculator
from specattn.pairs import Pair
from specattn.plan import Plan
from specattn.request import GenerationResult, Request
from specattn.sampling import SamplingParams, race

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
RAGGED = [PROMPT[:7], PROMPT, PROMPT[3:20], PROMPT[10:39]]
STREAMING = "streaming:budget=0.8:sink=2"
METHODS = [
    STREAMING,
    "longformer:budget=12:sink=2",
    "bigbird:budget=16:block=4:first=1:recent=2",
    "random:budget=0.7:sink=1:window=2",
    "topk:budget=12",
    "oracle:p=0.7",
    "quest:budget=0.5:page=4",
    "twilight:base=(quest:budget=0.5:page=4):p=0.9",
    "vattention:base=topk:sink=2:window=3:least=4:eps=0.9:delta=0.9:verify=denominator",
    "specattn:p=0.7",
    "specattn-paper:p=0.8",
    "specattn:p=0.6:signals=both",
    "self:p=0.8",
    "specattn:p=0.7:map=global:aggregate=union",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Passes as small as these are many times slower on two threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def related(model_type: str = "llama", **options) -> Pair:
    """A draft that is the target with some noise, so that each stage accepts some tokens and rejects others."""
    target = tiny_model(model_type, **options)
    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(3)
    for parameter in draft.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Pair(f"related-{model_type}", target, draft, tiny_tokenizer())


def alone(pair: Pair) -> Pair:
    return Pair(pair.name, pair.target, None, pair.tokenizer)


@cache
def dense_greedy(pair_type: str, prompt: tuple[int, ...], count: int) -> list[int]:
    output = related(pair_type).target.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def run(pair: Pair, prompts, method=STREAMING, count=24, **options) -> list[GenerationResult]:
    mapping = tiny_mapping(pair) if "specattn" in method else None
    options = {"lossless": True, "ignore_eos": True, **options}
    return generate(pair, prompts, method=method, mapping=mapping, max_new_tokens=count, **options)


def expected(prompts, count=24, pair_type="llama") -> list[list[int]]:
    return [dense_greedy(pair_type, tuple(prompt), count) for prompt in prompts]


# Greedy: token for token


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_dense_tokens_in_a_ragged_batch(method):
    results = run(related(), RAGGED, method, lossless_every=7)
    assert [result.tokens for result in results] == expected(RAGGED)
    accepted, proposed = (
        sum(getattr(r.lossless, name) for r in results) for name in ("accepted", "proposed")
    )
    assert 0.1 * proposed < accepted < proposed, "both acceptance and correction are at work"


def test_the_methods_would_otherwise_go_astray():
    """Or the tests above could not tell a mode that verifies nothing."""
    prompts = RAGGED[1:2]
    sparse = [run(related(), prompts, method, lossless=False)[0].tokens for method in METHODS]
    assert sum([tokens] != expected(prompts) for tokens in sparse) > len(METHODS) / 2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture(model_type):
    pair = related(model_type)
    results = run(pair, RAGGED[:2], "streaming:budget=10:sink=2:dense_layers=0", count=16)
    assert [result.tokens for result in results] == expected(RAGGED[:2], 16, model_type)


@pytest.mark.parametrize("every", [1, 2, 5, 64, "auto"])
@pytest.mark.parametrize("gamma", [1, 4, "auto"])
def test_any_length_of_cycles_and_rounds(every, gamma):
    (result,) = run(related(), [PROMPT], lossless_every=every, gamma=gamma)
    assert [result.tokens] == expected([PROMPT])


def test_there_is_nothing_to_fall_back_to():
    engine = Engine(related(), method=STREAMING, max_tokens=50, gamma="auto", lossless=True, fallback=True)
    assert set(engine.policy.plans) == {Plan(gamma, sparse=True) for gamma in GAMMAS}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gamma", [3, "auto"])
def test_the_policy_learns_from_sparse_rounds_not_from_cycles(gamma, fast):
    pair = related()
    options = {
        "method": "specattn:p=0.1:sink=0:window=0:dense_layers=0",
        "lossless": True,
        "lossless_every": 1,
    }
    with Engine(
        pair, max_tokens=300, gamma=gamma, fast=fast, mapping=tiny_mapping(pair), **options
    ) as engine:
        engine.submit(Request(PROMPT * 5, max_new_tokens=40, ignore_eos=True))
        *_, last = engine.stream()
    assert engine.policy.chosen.total() == last.result.rounds
    assert engine.policy.model.density < 0.2 < last.result.kv_read_fraction


@pytest.mark.parametrize("method", [STREAMING, "self:p=0.9", "quest:budget=0.5:page=4", "oracle:p=0.7"])
def test_without_a_draft_the_sparse_target_drafts(method):
    results = run(alone(related()), RAGGED, method, lossless_every=6)
    assert [result.tokens for result in results] == expected(RAGGED)
    assert all(set(result.accepted_per_round) == {0} for result in results)
    assert all(result.lossless.dense_reads_per_token < 0.8 for result in results)


def test_a_full_selection_is_accepted_whole():
    pair = related()
    (result,) = run(alone(pair), [PROMPT], "oracle:p=1:dense_layers=0", lossless_every=6, count=25)
    account = result.lossless
    assert (account.dense_passes, account.proposed, account.accepted) == (4, 24, 24)
    assert account.dense_reads_per_token == 4 / 24
    assert result.kv_read_fraction == 1.0
    # 24 sparse rounds and 4 dense passes, all of which read everything.
    assert account.kv_reads_per_token == pytest.approx(28 / 24)


def test_fractions_cover_passes_of_both_kinds():
    pair = related()
    options = {"method": "streaming:budget=4:sink=2:dense_layers=0", "lossless_every": 8}
    (result,) = run(alone(pair), [PROMPT * 5], count=40, **options)
    (sparse,) = run(alone(pair), [PROMPT * 5], count=40, lossless=False, method=options["method"])
    dense, rounds = result.lossless.dense_passes, result.rounds
    share = (dense + rounds * sparse.kv_read_fraction) / (dense + rounds)
    assert result.kv_read_fraction == pytest.approx(share, rel=0.02)


def test_a_request_does_not_depend_on_its_neighbours():
    """Nor does its account where a cycle is a round; else the number of rounds follows from what all have accepted."""
    for every in (1, 5):
        together = run(related(), RAGGED, lossless_every=every)
        for prompt, result in zip(RAGGED, together, strict=True):
            (single,) = run(related(), [prompt], lossless_every=every)
            assert single.tokens == result.tokens
            if every == 1:
                assert single.lossless == result.lossless
                assert single.accepted_per_round == result.accepted_per_round
                assert single.kv_read_fraction == pytest.approx(result.kv_read_fraction)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rounds_on_the_device_give_the_same_tokens(temperature):
    options = {"method": "specattn:p=0.7", "lossless_every": 6, "temperature": temperature}
    torch_path = run(related(), RAGGED, fast=False, **options)
    fast = run(related(), RAGGED, fast=True, **options)
    assert [result.tokens for result in fast] == [result.tokens for result in torch_path]
    for one, other in zip(fast, torch_path, strict=True):
        assert one.accepted_per_round == other.accepted_per_round
        assert one.kv_read_fraction == pytest.approx(other.kv_read_fraction)


# What is left in the caches


@pytest.mark.parametrize("method", [STREAMING, "quest:budget=0.5:page=4:dense_layers=0"])
def test_caches_and_side_stores_hold_what_a_dense_pass_writes(method):
    pair = related()
    with Engine(pair, method=method, max_batch=2, max_tokens=300, lossless=True, lossless_every=6) as engine:
        for prompt in RAGGED[:2]:
            engine.submit(Request(prompt, max_new_tokens=60, ignore_eos=True))
        for _ in range(5):
            engine.advance()
            speculator = engine.speculator
            for active in engine._active.values():
                tokens = [*active.request.prompt, *active.tokens]
                check_cache(speculator.target, active.slot, tokens, active.length)
                check_cache(speculator.draft, active.slot, tokens, active.length - 1)


def check_cache(runner, slot: int, tokens: list[int], length: int) -> None:
    """What a slot holds is what reading the text densely writes, the stores' part of it included."""
    assert runner.cache.length(slot) == length
    fresh = type(runner)(runner.model, tokens=200, slots=1, stores=list(runner.cache.stores))
    other = fresh.cache.allocate(length)
    fresh.prefill(other, tokens[:length])
    for layer in range(runner.geometry.layers):
        for ours, clean in zip(
            held(runner, layer, slot, length), held(fresh, layer, other, length), strict=True
        ):
            assert torch.allclose(ours, clean, atol=1e-4)


def held(runner, layer: int, slot: int, length: int) -> list[torch.Tensor]:
    cache = runner.cache
    rows = cache.rows(torch.tensor([slot]), torch.arange(length)[None])[0]
    tensors = [cache.keys[layer][rows], cache.values[layer][rows]]
    for store in cache.stores.values():
        # A page that is not full yet is worked out anew before it is read.
        whole = length // store.page * store.page
        tensors.append(store.bounds[layer][rows[: whole : store.page] // store.page])
    return tensors


# Ends of a request


def test_an_end_token_and_a_stop_string_inside_a_cycle():
    pair = related()
    whole = run(pair, [PROMPT], lossless_every=9)[0]
    stop = whole.text[5:8]
    (result,) = run(pair, [PROMPT], lossless_every=9, stop=[stop])
    assert (result.finish_reason, result.text) == ("stop", whole.text[: whole.text.index(stop)])
    pair.target.generation_config.eos_token_id = whole.tokens[4]
    try:
        (result,) = run(pair, [PROMPT], lossless_every=9, ignore_eos=False)
    finally:
        pair.target.generation_config.eos_token_id = 1
    assert result.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4]) + 1]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("draft", [True, False])
def test_the_context_ends_inside_a_cycle(draft):
    pair = related("llama", max_positions=64)
    limit = pair.context_limit
    prompts = [(PROMPT * 2)[: limit - 6], (PROMPT * 2)[: limit - 1], PROMPT[:20]]
    results = run(pair if draft else alone(pair), prompts, lossless_every=16, count=40)
    assert [len(result.tokens) for result in results] == [6, 1, 40]
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        count = len(result.tokens)
        output = pair.target.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert result.tokens == output[0, len(prompt) :].tolist()


def test_a_prompt_of_one_token():
    assert [run(related(), [PROMPT[:1]])[0].tokens] == expected([PROMPT[:1]])


def test_only_verified_tokens_are_delivered_and_a_cancelled_request_keeps_them():
    with Engine(related(), method=STREAMING, max_tokens=200, lossless=True, lossless_every=8) as engine:
        id = engine.submit(Request(PROMPT, max_new_tokens=50, ignore_eos=True))
        seen = [token for _ in range(3) for update in engine.advance() for token in update.tokens]
        result = engine.cancel(id)
        assert engine.speculator.target.cache.used_bytes == engine.speculator.draft.cache.used_bytes == 0
    assert result.finish_reason == "interrupted"
    assert result.tokens == seen == dense_greedy("llama", tuple(PROMPT), len(seen))


# Sampling


def test_samples_depend_on_the_seed_alone():
    """Not on the method, the draft, the lengths of rounds and cycles, or the batch."""
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 5}
    first = [result.tokens for result in run(related(), RAGGED, **options)]
    for method, pair, every, gamma in [
        ("oracle:p=0.6:dense_layers=0", related(), 3, 2),
        ("specattn:p=0.5:dense_layers=0", related(), "auto", 5),
        ("random:budget=0.4", alone(related()), 11, 4),
    ]:
        results = run(pair, RAGGED, method, lossless_every=every, gamma=gamma, **options)
        assert [result.tokens for result in results] == first
    assert run(related(), RAGGED[1:2], **{**options, "seed": 6})[0].tokens == first[1]
    assert [result.tokens for result in run(related(), RAGGED, **{**options, "seed": 50})] != first


def test_sampled_tokens_are_accepted_at_both_stages():
    results = run(related(), RAGGED, temperature=0.7, lossless_every=8, count=40)
    assert 0.3 < sum(result.lossless.acceptance_rate for result in results) / 4 < 1
    assert 0.2 < sum(result.acceptance_rate for result in results) / 4 < 1


def test_races_draw_from_the_distribution_and_agree_where_distributions_do():
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(7, generator=generator)
    first[3] = 0
    second = first + 0.1 * torch.rand(7, generator=generator)
    first, second = first / first.sum(), second / second.sum()
    seeds, positions = torch.arange(200), torch.arange(100).expand(200, -1)
    drawn = [race(p.expand(200, 100, -1), seeds, positions).argmax(-1) for p in (first, second)]
    for p, tokens in zip((first, second), drawn, strict=True):
        share = torch.bincount(tokens.flatten(), minlength=7) / 20_000
        assert share[p == 0].sum() == 0
        assert (share - p).abs().max() < 0.015
    distance = float((first - second).abs().sum() / 2)
    agree = float((drawn[0] == drawn[1]).float().mean())
    assert (1 - distance) / (1 + distance) - 0.01 < agree < 1 - distance + 0.01


def test_races_at_different_positions_are_independent():
    drawn = race(
        torch.full((4000, 2, 2), 0.5), torch.arange(4000), torch.tensor([[8, 9]]).expand(4000, -1)
    ).argmax(-1)
    assert abs(float((drawn[:, 0] == drawn[:, 1]).float().mean()) - 0.5) < 0.04


def test_a_small_probability_wins_as_rarely_as_it_should():
    """With 24-bit numbers the first of 150,000 tokens is decided by the grid that they lie on."""
    probs = torch.full((20, 5, 150_000), 1e-9)
    probs[..., 0] = 1.0
    drawn = race(probs, torch.arange(20), torch.arange(5).expand(20, -1)).argmax(-1)
    assert int((drawn != 0).sum()) <= 1


def test_rejection_by_the_sparse_probabilities_would_be_biased():
    """Why the dense pass does not take them for what the pending tokens were drawn from.

    They may depend on the very proposal: here the selection shows the sparse target (1/2, 1/2) when 0 is proposed and
    (1, 0) when 1 is. A dense target of (1/2, 1/2) would come out as (3/4, 1/4).
    """
    count = 4000
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(5, count, generator=generator)
    half, sure = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    proposal = (u[0] < 0.5).long()[:, None]
    sparse = torch.where(proposal[..., None] == 0, half, sure)
    first = verify(proposal, half.expand(count, 1, 2), sparse.repeat(1, 2, 1), u[1][:, None], u[2])
    pending = torch.where(first.accepted > 0, proposal[:, 0], first.next_token)[:, None]
    second = verify(pending, sparse, half.expand(count, 2, 2), u[3][:, None], u[4])
    final = torch.where(second.accepted > 0, pending[:, 0], second.next_token)
    assert float((final == 0).float().mean()) == pytest.approx(0.75, abs=0.03)


# The length of cycles


@pytest.mark.parametrize("rate,cost", [(0.5, 0.1), (0.9, 0.1), (0.97, 0.05), (0.97, 0.3)])
def test_auto_has_the_best_yield(rate, cost):
    policy = EveryPolicy(cost=cost, _accepted=1000 * rate, _decided=1000.0)
    chosen = policy.choose()

    def delivered(n: int) -> float:
        """The mean, from the probability of each number of accepted tokens."""
        return sum(rate**i * (1 - rate) * (i + 1) for i in range(n)) + rate**n * n

    yields = {n: delivered(n) / (1 + n * cost) for n in range(1, 33)}
    assert yields[chosen] == pytest.approx(max(yields.values()))


def test_auto_follows_what_is_accepted_and_what_it_costs():
    policy = EveryPolicy()
    before = policy.choose()
    for _ in range(60):
        policy.observe(10, 10)
    assert policy.choose() > before
    for _ in range(60):
        policy.observe(0, 10)
    assert policy.choose() < before
    policy = EveryPolicy()
    for _ in range(60):
        policy.observe_cost(80.0, 100.0)
    assert policy.cost == pytest.approx(0.8, abs=0.05)
    assert policy.choose() < before


# Bad input


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("snapkv", {}, "drops tokens for good"),
        ("h2o", {}, "drops tokens for good"),
        ("dense", {}, "lossless already"),
        (STREAMING, {"lossless_every": 0}, "lossless_every=0"),
        (STREAMING, {"lossless_every": 65}, "at most 64"),
        (STREAMING, {"lossless_every": "often"}, "'often'"),
        (STREAMING, {"lossless_every": True}, "lossless_every=True"),
        (STREAMING, {"lossless": False, "lossless_every": 4}, "no effect without lossless"),
    ],
)
def test_bad_input_is_refused_before_any_work(method, options, message, monkeypatch):
    pair = tiny_pair("llama")
    monkeypatch.setattr(type(pair.target), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=message):
        run(pair, [PROMPT], method, **options)


def test_the_engine_holds_a_lossless_speculator_only_if_asked():
    pair = tiny_pair("llama")
    assert isinstance(Engine(pair, method="dense", max_tokens=50).speculator, LosslessSpeculator) is False
    engine = Engine(pair, method=STREAMING, max_tokens=50, lossless=True)
    assert isinstance(engine.speculator, LosslessSpeculator)
    assert run(pair, [PROMPT], lossless=False)[0].lossless is None
    assert SamplingParams().temperature == 0
