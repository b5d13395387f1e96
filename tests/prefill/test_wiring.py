"""The seam for prefill methods: who is asked, what is counted, and what stays dense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from tiny import tiny_mapping, tiny_model, tiny_pair

from specattn.accounting import PrefillMeter
from specattn.attention import PrefillAttend, attached
from specattn.errors import UsageError
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.dense import Dense
from specattn.prefill.registry import PREFILLS, parse_prefill
from specattn.runner import ModelRunner
from specattn.selection.registry import parse_method

PROMPT = torch.randint(3, 90, (150,), generator=torch.Generator().manual_seed(2)).tolist()
TEXT = torch.randint(3, 90, (161,), generator=torch.Generator().manual_seed(3)).tolist()
WINDOW = 8


@dataclass(frozen=True)
class Recent(PrefillMethod):
    """Each row sees its last eight tokens; every call is kept."""

    name: ClassVar[str] = "recent"
    calls: list[PrefillCall] = field(default_factory=list)

    def attention(self, call: PrefillCall) -> PrefillOutput:
        self.calls.append(call)
        out = dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling, WINDOW)
        positions = call.start + torch.arange(call.query.shape[0])
        return PrefillOutput(out, (positions + 1).clamp(max=WINDOW).sum() / (positions + 1).sum())


@dataclass(frozen=True)
class OnlyNarrow(Dense):
    """Refuses every model."""

    name: ClassVar[str] = "only-narrow"

    def check(self, config):
        raise UsageError(f"hidden_size={config.hidden_size} is too wide")


def share(length: int) -> float:
    visible = range(1, length + 1)
    return sum(min(WINDOW, count) for count in visible) / sum(visible)


@pytest.mark.parametrize("method", ["dense", "specattn:p=0.7"])
def test_dense_prefill_changes_nothing(method):
    pair = tiny_pair("qwen2")
    options = {"method": method, "mapping": tiny_mapping(pair), "max_new_tokens": 16}
    before = generate(pair, [PROMPT], **options)[0]
    after = generate(pair, [PROMPT], prefill="dense", **options)[0]
    assert (after.tokens, after.kv_read_fraction) == (before.tokens, before.kv_read_fraction)
    assert (
        (before.prefill, before.prefill_computed) == (after.prefill, after.prefill_computed) == ("dense", 1.0)
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_dense_method_through_the_seam_is_dense_attention(model_type):
    model, logits = tiny_model(model_type), []
    meter = PrefillMeter(2, "cpu")
    for attend in (None, PrefillAttend(Dense(), meter)):
        with attached(model):
            runner = ModelRunner(model, tokens=160, slots=2)
            logits.append(runner.prefill(runner.cache.allocate(160), PROMPT, chunk=70, attend=attend))
    assert torch.equal(*logits)
    assert meter.fraction(0) == 1.0 and meter.computed[1] == 0


def test_a_method_answers_for_the_target_alone_and_not_for_its_sliding_windows():
    pair, method = tiny_pair("gemma3_text", layers=4), Recent()
    assert pair.target.config.layer_types.count("full_attention") == 2
    result = generate(pair, [PROMPT], method="dense", prefill=method, max_new_tokens=4)[0]
    assert [call.layer for call in method.calls] == [1, 3]
    for call in method.calls:
        assert (call.start, call.query.shape, call.key.shape) == (0, (150, 4, 16), (150, 2, 16))
    assert result.prefill_computed == pytest.approx(share(150))
    assert result.prefill.startswith("recent")


def test_chunks_are_told_what_came_before_and_count_by_their_products():
    model, method = tiny_model("llama"), Recent()
    with attached(model):
        runner = ModelRunner(model, tokens=160, slots=1)
        runner.prefill(runner.cache.allocate(160), PROMPT, chunk=64, method=method)
    calls = [call for call in method.calls if call.layer == 2]
    assert [(call.start, len(call.query), len(call.key)) for call in calls] == [
        (0, 64, 64),
        (64, 64, 128),
        (128, 22, 150),
    ]
    assert runner.prefill_meter.fraction(0) == pytest.approx(share(150))
    runner.prefill_meter.reset(0)
    assert runner.prefill_meter.fraction(0) == 1.0


def test_each_request_has_its_own_account():
    pair = tiny_pair("llama")
    prompts = [PROMPT[:20], PROMPT, PROMPT[:60]]
    results = generate(pair, prompts, method="dense", prefill=Recent(), max_new_tokens=3, max_batch=2)
    assert [r.prefill_computed for r in results] == pytest.approx([share(20), share(150), share(60)])


def test_evaluation_keeps_its_reference_dense_and_decodes_on_the_sparse_context():
    pair, documents = tiny_pair("llama"), [Document("a", TEXT), Document("b", PROMPT + PROMPT[:11])]
    methods = [parse_method("dense"), parse_method("streaming:budget=0.5")]
    options = {"context": 160, "rows": 20}
    dense = list(evaluate(pair, documents, methods, **options))
    sparse = list(evaluate(pair, documents, methods, prefill=Recent(), **options))
    for one, other in zip(dense, sparse, strict=True):
        assert one.perplexity_dense == other.perplexity_dense
        assert other.prefill_computed == pytest.approx(share(140))
    assert all(result.kl < 1e-6 for result in dense if result.method == "dense")
    assert all(result.kl > 0.01 for result in sparse if result.method == "dense")
    again = list(evaluate(pair, documents[:1], methods, prefill=Recent(), **options))
    assert [r.kl for r in again] == pytest.approx([sparse[0].kl, sparse[2].kl], rel=1e-4)


def test_the_sparse_context_is_that_of_a_model_with_a_window():
    """Rows decoded densely on a context that each row read through a window, against masks in transformers."""
    pair, prefix = tiny_pair("llama"), 140
    (result,) = evaluate(
        pair, [Document("a", TEXT)], [parse_method("dense")], prefill=Recent(), context=160, rows=20
    )
    row, token = torch.arange(160)[:, None], torch.arange(160)[None]
    mask = (token <= row) & ((row >= prefix) | (token > row - WINDOW))
    with torch.inference_mode():
        logits = pair.target(torch.tensor([TEXT[:160]]), attention_mask=mask[None, None]).logits[0, prefix:]
    following = torch.tensor(TEXT[prefix + 1 : 161])
    loss = torch.nn.functional.cross_entropy(logits.double(), following)
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_unknown_names_and_models_that_do_not_fit_are_refused():
    pair = tiny_pair("llama")
    with pytest.raises(UsageError, match=r"unknown prefill method 'dence' \(did you mean 'dense'\?\)"):
        generate(pair, [PROMPT], method="dense", prefill="dence")
    with pytest.raises(UsageError, match="hidden_size=48 is too wide"):
        generate(pair, [PROMPT], method="dense", prefill=OnlyNarrow())
    with pytest.raises(UsageError, match="hidden_size=48 is too wide"):
        next(
            evaluate(
                pair,
                [Document("a", TEXT)],
                [parse_method("dense")],
                prefill=OnlyNarrow(),
                context=160,
                rows=9,
            )
        )


@pytest.mark.parametrize("name", PREFILLS)
def test_every_name_makes_a_method_of_that_name(name):
    method = parse_prefill(name)
    assert method.name == name and method.spec() == name
