"""What an evaluation leaves as it was, holds, reports and refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from fidelity_case import CONTEXT, GAMMA, PREFIX, ROWS, SPANS, assert_dense, document, run
from tiny import tiny_mapping, tiny_pair

from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.decoding import Decoding
from specattn.evaluation.fidelity import evaluate
from specattn.evaluation.session import Session
from specattn.pairs import Pair
from specattn.selection.registry import parse_method

FULL = ["dense", "streaming:budget=1:dense_layers=0", "oracle:p=1:dense_layers=0"]
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
        pair, [document()], [parse_method(m) for m in FULL], context=CONTEXT, rows=ROWS, gamma=GAMMA
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
