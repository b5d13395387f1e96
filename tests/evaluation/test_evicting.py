"""Fidelity of the methods that drop tokens for good, against a model that forgets, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from eviction_papers import Forgetful, H2OReading, snapkv
from fidelity_case import (
    CONTEXT,
    GAMMA,
    PREFIX,
    ROWS,
    SPANS,
    assert_figures,
    document,
    figures,
    run,
)
from masked_model import attention_weights, causal, masked_logits
from tiny import tiny_model, tiny_pair, tiny_tokenizer
from torch import Tensor

from specattn.attention import attached
from specattn.evaluation.decoding import Decoding
from specattn.evaluation.session import Session
from specattn.pairs import Pair
from specattn.prefill.dense import Dense
from specattn.selection.registry import parse_method

SNAPKV = "snapkv:budget=20:window=6:kernel=3"
H2O = "h2o:budget=24:every=3"
MIXED = ["dense", SNAPKV, "streaming:budget=0.2", H2O, "specattn:p=0.7"]


def forgetful_masks(pair: Pair, method: str, tokens: list[int]) -> list[Tensor]:
    """What each layer's query heads see, row by row."""
    if method == H2O:
        reading = H2OReading(pair.target, budget=24, heavy=0.5, every=3)
        reading.read(tokens, PREFIX, [count for _, count in SPANS])
        return reading.masks
    text = Forgetful(pair.target, tokens)
    options = {"budget": 20, "window": 6, "kernel": 3, "pooling": "max", "gqa": "mean"}
    text.see(PREFIX, ROWS, snapkv(pair.target, tokens[:PREFIX], **options))
    return text.masks


def read_tokens(masks: list[Tensor], start: int, count: int) -> float:
    """Tokens that a round's rows see together: mean over layers and heads."""
    seen = [mask[:, start : start + count].any(1).sum(-1).float().mean() for mask in masks]
    return float(torch.stack(seen).mean())


@pytest.mark.parametrize("method", [SNAPKV, H2O])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_figures_and_reads_are_those_of_a_model_that_forgets(method, model_type):
    pair, text = tiny_pair(model_type), document()
    tokens = text.tokens[:CONTEXT]
    masks = forgetful_masks(pair, method, tokens)
    dense = masked_logits(pair.target, tokens, [causal(CONTEXT)] * 3)
    expected = figures(dense, masked_logits(pair.target, tokens, masks), text.tokens)
    (result,) = run(pair, [method])
    assert expected["kl"] > 1e-2
    assert_figures(result, expected)
    token = 2 * 16 * 4
    cost = token + 4 if method == H2O else token  # the accumulated score is read as well
    read = sum(read_tokens(masks, start, count) * cost for start, count in SPANS)
    full = sum((start + count) * token for start, count in SPANS)
    assert result.kv_read_fraction == pytest.approx(read / full, rel=1e-6)


@pytest.mark.parametrize("method", [SNAPKV, H2O])
def test_the_attention_mass_is_what_dense_attention_gives_to_what_is_left(method):
    """In a model of one layer the queries and keys are those of the dense model."""
    pair = Pair("one layer", tiny_model("llama", layers=1), tiny_model("llama", layers=2), tiny_tokenizer())
    tokens = document().tokens[:CONTEXT]
    (result,) = run(pair, [method])
    kept = (attention_weights(pair.target, tokens)[0] * forgetful_masks(pair, method, tokens)[0]).sum(-1)
    rounds = [float(kept[:, start : start + count].mean()) for start, count in SPANS]
    assert result.attention_mass == pytest.approx(sum(rounds) / len(rounds), rel=1e-4)
    assert 0.1 < result.attention_mass < 0.9


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_full_budget_is_dense(model_type):
    for result in run(tiny_pair(model_type), ["snapkv:budget=1", "snapkv:budget=900", "h2o:budget=1"]):
        assert abs(result.kl) < 1e-9
        assert result.top1_agreement == 1
        assert result.attention_mass == pytest.approx(1, abs=1e-5)
        assert result.kv_read_fraction == 1 or result.method == "h2o"


def test_a_method_leaves_no_trace_for_the_next():
    pair = tiny_pair("qwen3", layers=4)
    first = run(pair, MIXED)
    assert run(pair, MIXED[::-1]) == first[::-1]
    assert run(pair, [SNAPKV, SNAPKV, H2O]) == [first[1], first[1], first[3]]


@pytest.mark.parametrize("method", [SNAPKV, H2O])
def test_the_caches_are_left_as_they_were(method):
    pair = tiny_pair("llama")
    documents = [document("a", 1), document("b", 2)]
    session = Session(pair, CONTEXT, ROWS, GAMMA, 2, Dense(), [parse_method(method)], None)

    def contents() -> list[Tensor]:
        caches = [runner.cache for runner in session.runners]
        assert {cache.length(slot) for cache in caches for slot in session.slots} == {PREFIX}
        segments = [
            cache.segments(layer, slot, 0, PREFIX)
            for cache in caches
            for layer in range(cache.geometry.layers)
            for slot in session.slots
        ]
        return [torch.cat([torch.cat(pair) for pair in parts]).clone() for parts in segments]

    with attached(*pair.models), torch.inference_mode():
        session.read(documents)
        before = contents()
        Decoding(session, parse_method(method), None).run()
        after = contents()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_documents_in_a_batch_give_what_each_gives_alone():
    pair = tiny_pair("gemma3_text", layers=4)
    documents = [document(name, seed) for seed, name in enumerate("abc")]
    together = run(pair, [SNAPKV, H2O], documents, batch=3)
    alone = run(pair, [SNAPKV, H2O], documents, batch=1)
    order = {(result.document, result.method): result for result in alone}
    for result in together:
        expected = order[result.document, result.method]
        for name in ("kl", "perplexity", "attention_mass", "kv_read_fraction"):
            assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-9)


def test_progress_reports_every_token():
    done: dict[str, int] = {}

    def progress(what: str, count: int) -> None:
        done[what] = done.get(what, 0) + count

    run(tiny_pair("llama"), [SNAPKV, H2O], progress=progress)
    assert done["book: snapkv prefill"] == done["book: h2o prefill"] == PREFIX
    assert done["book: snapkv"] == done["book: h2o"] == ROWS
