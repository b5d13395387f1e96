"""Fidelity against transformers: its own dense loss, and its eager attention under masks that imitate a method."""

from __future__ import annotations

import math

import pytest
import torch
from fidelity_case import (
    CONTEXT,
    GAMMA,
    PREFIX,
    ROWS,
    SPANS,
    assert_dense,
    assert_figures,
    document,
    figures,
    run,
)
from masked_model import (
    attention_weights,
    causal,
    masked_logits,
    mixture_mask,
    streaming_mask,
)
from tiny import MODEL_TYPES, tiny_mapping, tiny_model, tiny_pair, tiny_tokenizer
from torch import Tensor

from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.selection.base import Method
from specattn.selection.registry import parse_method
from specattn.selection.specattn import SpecAttn


def test_the_rounds_behind_a_result():
    (result,) = run(tiny_pair("llama"), ["specattn:p=0.5:dense_layers=1"])
    detail = result.detail
    counts = [count for _, count in SPANS]
    assert len(detail.kl) == len(detail.nll_change) == len(counts) and counts[-1] != counts[0]

    def mean(figures: tuple[float, ...]) -> float:
        return sum(figure * count for figure, count in zip(figures, counts, strict=True)) / ROWS

    assert mean(detail.kl) == pytest.approx(result.kl)
    assert mean(detail.nll_change) == pytest.approx(math.log(result.perplexity / result.perplexity_dense))
    masses = [mass for layer in detail.breakdown.mass for mass in layer]
    assert detail.breakdown.layers == [1, 2] and sum(masses) / 4 == pytest.approx(result.attention_mass)


FULL = ["dense", "streaming:budget=1:dense_layers=0", "oracle:p=1:dense_layers=0"]
FULL += ["specattn:p=1:dense_layers=0", "specattn-paper:p=1:dense_layers=0"]
FULL += ["quest:budget=1:dense_layers=0", "twilight:base=full:p=1:dense_layers=0"]
FULL += ["vattention:eps=1e-9:sink=2:window=4:least=4:dense_layers=0"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_full_selection_is_dense(model_type):
    results = run(tiny_pair(model_type), FULL)
    assert [result.method for result in results] == [name.split(":")[0] for name in FULL]
    for result in results:
        assert_dense(result)
    assert results[0].attention_mass == 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_dense_perplexity_is_transformers_own_loss(model_type):
    pair, text = tiny_pair(model_type), document()
    ids = torch.tensor([text.tokens])
    labels = ids.clone()
    labels[:, : PREFIX + 1] = -100  # a label is predicted by the row before it
    with torch.inference_mode():
        loss = pair.target(ids, labels=labels).loss
    (result,) = run(pair, ["dense"], [text])
    assert result.perplexity_dense == pytest.approx(float(loss.exp()), rel=1e-4)


def masks_of(pair: Pair, method: Method, sparse: list[Tensor]) -> list[Tensor]:
    """What each layer of the target sees: dense, a sliding window, or its mask in ``sparse``."""
    config = pair.target.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    masks = []
    for layer, (kind, mask) in enumerate(zip(kinds, sparse, strict=True)):
        sliding = kind == "sliding_attention"
        dense = causal(CONTEXT, config.sliding_window if sliding else None)
        masks.append(dense if sliding or method.is_dense(layer) else mask)
    return masks


def compare_with_masked_model(pair: Pair, method: Method, sparse: list[Tensor], text: Document):
    """Assert that ``method`` does to the target what the masks do; returns the result and the masks."""
    tokens = text.tokens[:CONTEXT]
    masks = masks_of(pair, method, sparse)
    dense = masked_logits(pair.target, tokens, masks_of(pair, parse_method("dense"), sparse))
    with torch.inference_mode():
        assert torch.allclose(dense, pair.target(torch.tensor([tokens])).logits[0], atol=1e-3)
    expected = figures(dense, masked_logits(pair.target, tokens, masks), text.tokens)
    mapping = tiny_mapping(pair)
    options = {"context": CONTEXT, "rows": ROWS, "gamma": GAMMA, "mapping": mapping}
    (result,) = evaluate(pair, [text], [method], **options)
    assert expected["kl"] > 1e-3
    assert_figures(result, expected)
    assert result.kv_read_fraction == pytest.approx(read_fraction(masks), rel=1e-6)
    return result, masks


def read_fraction(masks: list[Tensor]) -> float:
    """Tokens that a round's rows see together, over those that they would see densely; heads weigh the same."""
    read = full = 0.0
    for mask in masks:
        window = causal(CONTEXT, 16)  # the tiny models' sliding window
        dense = window if torch.equal(mask, window) else causal(CONTEXT)
        for start, count in SPANS:
            rows = slice(start, start + count)
            read += float(mask[:, rows].any(1).sum(-1).float().mean())
            full += float(dense[:, rows].any(1).sum())
    return read / full


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_streaming_against_a_masked_model(model_type, dense_layers):
    pair, text = tiny_pair(model_type), document()
    method = parse_method(f"streaming:budget=14:sink=3:dense_layers={dense_layers}")
    mask = streaming_mask(CONTEXT, SPANS, budget=14, sink=3)
    compare_with_masked_model(pair, method, [mask] * 3, text)


@pytest.mark.parametrize(
    "name", ["specattn:p=0.6:dense_layers=0:sink=2:window=3", "specattn:p=0.8:map=global"]
)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_specattn_against_a_masked_model(model_type, name):
    """The whole way: the draft's attention on the text, its mixture, the nucleus by sorting, masks for each head."""
    pair, text = tiny_pair(model_type, layers=4), document()
    mapping, method = tiny_mapping(pair), parse_method(name)
    assert isinstance(method, SpecAttn) and pair.draft is not None
    draft = attention_weights(pair.draft, text.tokens[:CONTEXT]).flatten(0, 1)
    weights = mapping.heads_kv
    if method.map == "global":
        draft, weights = draft[mapping.global_heads], mapping.global_kv
    sparse = [mixture_mask(CONTEXT, SPANS, draft, layer, 2, method) for layer in weights]
    compare_with_masked_model(pair, method, sparse, text)


def test_the_attention_mass_is_that_of_the_dense_weights():
    """In a model of one layer the queries of a sparse pass are those of the dense one."""
    pair = Pair("one layer", tiny_model("llama", layers=1), tiny_model("llama", layers=2), tiny_tokenizer())
    method = parse_method("streaming:budget=14:sink=3:dense_layers=0")
    mask = streaming_mask(CONTEXT, SPANS, budget=14, sink=3)
    result, _ = compare_with_masked_model(pair, method, [mask], document())
    weights = attention_weights(pair.target, document().tokens[:CONTEXT])[0]
    kept = (weights * mask).sum(-1).mean(0)
    rounds = [float(kept[start : start + count].mean()) for start, count in SPANS]
    assert result.attention_mass == pytest.approx(sum(rounds) / len(rounds), rel=1e-5)
    assert 0 < result.attention_mass < 0.9


def test_the_oracle_keeps_the_mass_it_promises():
    (result,) = run(tiny_pair("llama"), ["oracle:p=0.7:dense_layers=0"])
    assert 0.7 <= result.attention_mass < 0.75
    assert result.kl > 0


def test_page_bounds_count_as_a_token_a_page():
    (result,) = run(tiny_pair("llama"), ["quest:budget=12:page=4:dense_layers=0"])
    read = full = 0
    for start, count in SPANS:
        partial = start % 4
        read += (2 if partial else 3) * 4 + partial + count  # three pages and the round's own tokens
        read += start // 4  # a minimum and a maximum are as large as a key and a value
        full += start + count
    assert result.kv_read_fraction == pytest.approx(read / full, rel=1e-6)


def test_methods_with_stores_of_their_own_do_not_meet():
    names = ["quest:budget=12:page=4", "twilight:base=(quest:budget=0.5:page=8):p=0.7", "twilight:base=full"]
    together = run(tiny_pair("llama"), [*names, *names])
    for name, first, again in zip(names, together[:3], together[3:], strict=True):
        (alone,) = run(tiny_pair("llama"), [name])
        assert alone == first == again
        assert first.kl > 0 and first.kv_read_fraction < 1


def test_a_draft_scores_from_the_copy_of_its_keys_that_a_method_asks_for():
    pair = tiny_pair("llama")
    exact, short = "specattn:p=0.6:draft_p=0.9", "specattn:p=0.6:draft_p=0.9:draft_keys=int4"
    together = run(pair, [exact, short, exact])
    assert together[0].kl == together[2].kl != together[1].kl
    assert together[1].kl == run(pair, [short])[0].kl


@pytest.mark.parametrize("name", ["oracle", "specattn", "specattn-paper", "twilight"])
def test_more_mass_is_more_read_and_less_divergence(name):
    less, more = run(tiny_pair("llama", layers=4), [f"{name}:p=0.5", f"{name}:p=0.9"])
    assert less.kl > more.kl > 0
    assert less.kv_read_fraction < more.kv_read_fraction < 1
    assert less.attention_mass < more.attention_mass < 1
    assert less.options == {**more.options, "p": 0.5}


def test_a_smaller_tolerance_is_more_read_and_less_divergence():
    name = "vattention:verify=denominator:sink=2:window=4:least=4:sample=0.1"
    less, more = run(tiny_pair("llama", layers=4), [f"{name}:eps=0.9", f"{name}:eps=0.2"])
    assert less.kl > more.kl > 0
    assert less.kv_read_fraction < more.kv_read_fraction < 1
    assert more.options["base"] == "topk:budget=0.02:sink=0:window=0"


def test_a_last_round_of_one_row_is_dense_for_methods_that_look_at_the_draft():
    (result,) = run(tiny_pair("llama"), ["specattn:p=0.3:dense_layers=0"], rows=1)
    assert_dense(result)
    (result,) = run(tiny_pair("llama"), ["specattn:p=0.3:dense_layers=0"], rows=2)
    assert result.kl > 1e-3


# What is read


def dense_bytes(pair: Pair, role: str, end: int, rows: int) -> float:
    """Bytes that dense attention reads for ``rows`` rows, the last of which is token ``end - 1``."""
    config = (pair.target if role == "target" else pair.draft).config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    tokens = 0
    for kind in kinds:
        tokens += min(end, config.sliding_window + rows - 1) if kind == "sliding_attention" else end
    return tokens * token


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_drafts_reads_are_over_the_targets(model_type):
    """A draft of gamma steps: the first reads two new tokens, the previous and the pending one."""
    pair = tiny_pair(model_type)
    sparse, dense = run(pair, ["specattn:p=0.5", "streaming"])
    read = full = 0.0
    for start, count in SPANS:
        full += dense_bytes(pair, "target", start + count, count)
        for step in range(count - 1):
            read += dense_bytes(pair, "draft", start + step + 1, 2 if step == 0 else 1)
    assert sparse.draft_read_fraction == pytest.approx(read / full)
    assert dense.draft_read_fraction == 0, "the method does not look at the draft"


@pytest.mark.parametrize("method", ["specattn:p=1", "specattn:p=1:dense_layers=0:map=layer"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_fractions_are_those_of_decoding(model_type, method):
    """Rounds that are accepted whole, in the engine, and the same text in an evaluation."""
    target = tiny_model(model_type)
    pair = Pair("own", target, target, tiny_tokenizer())
    mapping, prompt = tiny_mapping(pair), document().tokens[:60]
    options = {"method": method, "mapping": mapping, "gamma": GAMMA}
    (decoded,) = generate(pair, [prompt], max_new_tokens=21, ignore_eos=True, **options)
    assert decoded.accepted_per_round == [GAMMA] * 4
    text = Document("decoded", prompt + decoded.tokens)
    (result,) = run(pair, [method], [text], context=80, rows=20, mapping=mapping)
    assert result.kv_read_fraction == pytest.approx(decoded.kv_read_fraction)
    assert result.draft_read_fraction == pytest.approx(decoded.draft_read_fraction)


def test_a_pair_without_a_draft():
    pair = tiny_pair("llama")
    plain = Pair("plain", pair.target, None, pair.tokenizer)
    names = ["streaming:budget=0.2", "dense", "oracle:p=0.7"]
    assert run(plain, names) == run(pair, names)


def test_both_signals_begin_with_the_prefixs_last_rows_and_refreshing_costs_a_full_read():
    pair = tiny_pair("llama")
    once, often, always, draft = run(
        pair,
        [
            "specattn:p=0.4:signals=both",
            "specattn:p=0.4:signals=both:refresh=3",
            "specattn:p=0.4:signals=both:refresh=1:dense_layers=0",
            "specattn:p=0.4",
        ],
    )
    assert_dense(always)
    assert once.kv_read_fraction < often.kv_read_fraction < 1
    assert once.kl != draft.kl
    # Whatever ran before, a method begins with the prefix's own scores.
    (alone,) = run(pair, ["specattn:p=0.4:signals=both"])
    assert_figures(alone, {"kl": once.kl, "kv_read_fraction": once.kv_read_fraction})


def test_centroids_come_closer_than_leaving_the_rest_out():
    pair = tiny_pair("llama")
    alone, represented = run(pair, ["specattn:p=0.3", "specattn:p=0.3:centroids=16"])
    assert represented.kl < alone.kl
    assert represented.attention_mass == pytest.approx(alone.attention_mass, abs=0.05)
    assert alone.kv_read_fraction < represented.kv_read_fraction
