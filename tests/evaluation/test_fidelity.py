"""Fidelity against transformers: its own dense loss, and its eager attention under masks that imitate a method."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from masked_model import (
    attention_weights,
    causal,
    masked_logits,
    mixture_mask,
    round_spans,
    streaming_mask,
)
from tiny import MODEL_TYPES, tiny_mapping, tiny_model, tiny_pair, tiny_tokenizer
from torch import Tensor

from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.decoding import Decoding
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import FidelityResult, evaluate
from specattn.evaluation.session import Session
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.selection.base import Method
from specattn.selection.registry import parse_method
from specattn.selection.specattn import SpecAttn

CONTEXT, ROWS, GAMMA = 120, 43, 4
PREFIX = CONTEXT - ROWS
SPANS = round_spans(PREFIX, CONTEXT, GAMMA)


def document(name: str = "book", seed: int = 4, length: int = CONTEXT + 1) -> Document:
    tokens = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))
    return Document(name, tokens.tolist())


def run(pair: Pair, methods: list[str], documents: list[Document] | None = None, **options):
    options = {"context": CONTEXT, "rows": ROWS, "gamma": GAMMA, **options}
    if pair.draft is not None:
        options.setdefault("mapping", tiny_mapping(pair))
    return list(evaluate(pair, documents or [document()], [parse_method(m) for m in methods], **options))


def figures(dense: Tensor, sparse: Tensor, tokens: list[int]) -> dict[str, float]:
    """The figures of the evaluated rows from logits ``[context, vocab]``, in float64, row by row."""
    sums = dict.fromkeys(("kl", "total_variation", "top1_agreement", "nll", "nll_dense"), 0.0)
    for row in range(PREFIX, CONTEXT):
        p, q = dense[row].double().softmax(0), sparse[row].double().softmax(0)
        sums["kl"] += float((p * (p / q).log()).sum())
        sums["total_variation"] += float((p - q).abs().sum()) / 2
        sums["top1_agreement"] += float(p.argmax() == q.argmax())
        sums["nll"] -= float(q[tokens[row + 1]].log())
        sums["nll_dense"] -= float(p[tokens[row + 1]].log())
    means = {name: total / ROWS for name, total in sums.items()}
    perplexities = {
        name.replace("nll", "perplexity"): float(torch.tensor(means.pop(name)).exp())
        for name in ("nll", "nll_dense")
    }
    return means | perplexities


def assert_figures(result: FidelityResult, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=2e-3, abs=1e-6), name


def assert_dense(result: FidelityResult) -> None:
    assert abs(result.kl) < 1e-9
    assert result.total_variation < 1e-5
    assert result.top1_agreement == 1
    assert result.attention_mass == pytest.approx(1, abs=1e-6)
    assert result.kv_read_fraction == 1
    assert result.perplexity == pytest.approx(result.perplexity_dense, rel=1e-5)


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


# What stays as it was


SOME = ["streaming:budget=0.2", "specattn:p=0.7", "dense", "oracle:p=0.8", "specattn-paper:p=0.7"]


def test_a_method_leaves_no_trace_for_the_next():
    pair = tiny_pair("qwen3", layers=4)
    first = run(pair, SOME)
    assert run(pair, SOME) == first
    assert run(pair, SOME[::-1]) == first[::-1]
    assert run(pair, [SOME[1]] * 3) == [first[1]] * 3


def test_a_document_leaves_no_trace_for_the_next():
    pair = tiny_pair("qwen3", layers=4)
    documents = [document("a", 1, 150), document("b", 2), document("a", 1)]
    results = run(pair, SOME, documents, batch=1)
    assert results[: len(SOME)] == results[2 * len(SOME) :]
    assert [result.document for result in results] == ["a"] * 5 + ["b"] * 5 + ["a"] * 5
    assert results[5:10] == run(pair, SOME, documents[1:2])


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_documents_in_a_batch_give_what_each_gives_alone(model_type):
    pair = tiny_pair(model_type, layers=4)
    documents = [document(name, seed) for seed, name in enumerate("abcde")]
    together = run(pair, SOME, documents, batch=3)
    alone = run(pair, SOME, documents, batch=1)
    order = {(result.document, result.method): result for result in alone}
    assert [r.document for r in together] == ["a", "b", "c"] * 5 + ["d", "e"] * 5
    for result in together:
        expected = order[result.document, result.method]
        for name in ("kl", "perplexity", "attention_mass", "kv_read_fraction", "draft_read_fraction"):
            assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-9)


def test_the_reference_is_held_once(monkeypatch):
    from specattn.evaluation import session as module

    monkeypatch.setattr(module, "REFERENCE_ROWS", 8)
    logits, session = Session.logits, []
    chunks, alive = [], []

    def observed(self, target, step, start, count):
        result = logits(self, target, step, start, count)
        if count == module.REFERENCE_ROWS:
            alive.append(sum(chunk() is not None for chunk in chunks))
            chunks.append(weakref.ref(result))
            session[:] = [self]
        return result

    monkeypatch.setattr(Session, "logits", observed)
    places = []
    for _ in evaluate(
        tiny_pair("llama"),
        [document(name, seed) for seed, name in enumerate("abc")],
        [parse_method("streaming")],
        context=CONTEXT,
        rows=ROWS,
        batch=2,
    ):
        places.append(session[0].reference.data_ptr())
    assert len(alive) == 2 * (ROWS // 8) and max(alive) <= 1, "a chunk goes when it is in its place"
    assert len(set(places)) == 1, "the next batch writes to the same tensor"


@pytest.mark.parametrize(
    ("batch", "remedy"), [(2, "(--batch), a shorter"), (1, "Evaluate a shorter context")]
)
@pytest.mark.parametrize("place", [Session.__init__, Session.read, Decoding.__init__, Decoding.run])
def test_out_of_memory_names_what_needs_less(place, batch, remedy, monkeypatch):
    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\nmore to say")

    monkeypatch.setattr(f"{place.__module__}.{place.__qualname__}", full)
    with pytest.raises(CacheFullError) as caught:
        run(tiny_pair("llama"), ["streaming"], [document("a"), document("b")], batch=batch)
    message = str(caught.value)
    assert f"batch={batch}, context={CONTEXT} and rows={ROWS}: CUDA out of memory. Tried to" in message
    assert "allocate 2.50 GiB. Evaluate" in message and remedy in message and "--rows" in message


def test_between_results_the_models_are_as_they_were():
    """A caller may use the model, or train it, before asking for the next result."""
    pair = tiny_pair("llama")
    ids = torch.tensor([document().tokens])
    expected = pair.target(ids).logits
    results = evaluate(
        pair, [document()], [parse_method(m) for m in FULL[:3]], context=CONTEXT, rows=ROWS, gamma=GAMMA
    )
    for result in results:
        assert_dense(result)
        assert {model.config._attn_implementation for model in pair.models} == {"sdpa"}
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(pair.target(ids).logits, expected)


def test_results_come_one_by_one(monkeypatch):
    pair = tiny_pair("llama")
    passes = 0
    real = type(pair.target).forward

    def forward(self, *args, **kwargs):
        nonlocal passes
        passes += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pair.target), "forward", forward)
    methods = [parse_method(name) for name in ("dense", "streaming", "dense")]
    results = evaluate(pair, [document()], methods, context=CONTEXT, rows=ROWS, gamma=GAMMA)
    assert passes == 0
    counts = []
    for _ in results:
        counts.append(passes)
    read = 1 + 1 + 1  # both prefills and the dense reference
    assert counts == [read + number * len(SPANS) for number in (1, 2, 3)]


def test_progress_reports_every_token():
    done: dict[str, int] = {}
    seen: list[str] = []

    def progress(what: str, count: int) -> None:
        done[what] = done.get(what, 0) + count
        seen.append(what)

    run(tiny_pair("llama"), ["specattn", "streaming"], progress=progress)
    assert done == {
        "book: target prefill": PREFIX,
        "book: draft prefill": PREFIX,
        "book: dense reference": ROWS,
        "book: specattn": ROWS,
        "book: streaming": ROWS,
    }


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


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": CONTEXT}, f"rows={CONTEXT} must be at least 1 and below context={CONTEXT}"),
        ({"rows": 0}, "rows=0"),
        ({"rows": -3}, "rows=-3"),
        ({"gamma": 0}, "gamma=0 must be at least 1"),
        ({"context": 513}, "context=513 is beyond the models' limit of 512"),
        ({"context": CONTEXT + 1}, r"'book' has 121 tokens and 122 are needed"),
        ({"batch": 0}, "batch=0"),
        ({"mapping": None}, "needs a mapping calibrated for tiny-llama"),
    ],
)
def test_refusals_come_before_any_work(options, message, monkeypatch):
    pair = tiny_pair("llama")
    monkeypatch.setattr(type(pair.target), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=message):
        run(pair, ["dense", "specattn"], **options)


def test_another_pairs_mapping_and_a_missing_draft_are_refused():
    pair = tiny_pair("llama")
    with pytest.raises(UsageError, match="calibrated for"):
        run(pair, ["specattn"], mapping=tiny_mapping(tiny_pair("qwen3", layers=4)))
    with pytest.raises(UsageError, match="there is no draft"):
        run(Pair("plain", pair.target, None, pair.tokenizer), ["specattn"])


def test_every_document_is_looked_at_before_the_first_is_read():
    documents = [document("long"), document("short", length=CONTEXT)]
    seen: list[str] = []
    with pytest.raises(UsageError, match="'short' has"):
        run(tiny_pair("llama"), ["dense"], documents, progress=lambda what, count: seen.append(what))
    assert not seen


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
