"""Sparge as a prefill method: options, shapes, models, and a whole generation."""

from __future__ import annotations

import pytest
import torch
from naive_sparge import example
from tiny import tiny_model, tiny_pair

from specattn.errors import UsageError
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall
from specattn.prefill.registry import parse_prefill
from specattn.prefill.sparge import Sparge
from specattn.selection.registry import parse_method

EXACT = "sparge:tau=1:lam=inf:int8=false"
TEXT = torch.randint(3, 90, (6,), generator=torch.Generator().manual_seed(1)).repeat_interleave(80).tolist()
"""Long runs of one token: hidden states that are alike."""


def call(rows: int, length: int, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> PrefillCall:
    query, key, value = (t[0].transpose(0, 1) for t in example(rows, length, query_heads, kv_heads, head_dim))
    return PrefillCall(0, query, key, value, length - rows, 0.2)


def dense(call: PrefillCall):
    return dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling)


@pytest.mark.parametrize("query_heads,kv_heads", [(2, 2), (3, 1), (6, 1), (16, 2)])
@pytest.mark.parametrize("rows,length", [(1, 1), (1, 130), (131, 131), (200, 333), (64, 577)])
def test_keeping_everything_is_dense_prefill(query_heads, kv_heads, rows, length):
    one = call(rows, length, query_heads, kv_heads)
    output = parse_prefill(EXACT).attention(one)
    assert output.out.shape == one.query.shape
    assert error_ratio(output.out, dense(one)) < 1e-5
    assert output.computed.shape == () and output.computed == 1


def test_less_is_computed_where_blocks_can_be_predicted():
    one = call(512, 700)
    shares = [float(Sparge(theta=0.4, tau=tau).attention(one).computed) for tau in (0.5, 0.9, 0.98)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.8
    assert error_ratio(Sparge(theta=0.4, tau=0.98).attention(one).out, dense(one)) < 0.2


def test_the_dtype_is_the_querys():
    one = call(130, 200)
    half = PrefillCall(0, one.query.bfloat16(), one.key.bfloat16(), one.value.bfloat16(), one.start, 0.2)
    out = Sparge(tau=1.0).attention(half).out
    assert out.dtype == torch.bfloat16 and error_ratio(out, dense(one)) < 0.03


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma3_text"])
def test_generation_with_an_exact_prefill_is_dense_generation(model_type):
    pair = tiny_pair(model_type)
    options = {"method": "dense", "max_new_tokens": 12, "ignore_eos": True}
    expected = generate(pair, [TEXT[:300]], **options)[0]
    result = generate(pair, [TEXT[:300]], prefill=EXACT, **options)[0]
    assert result.tokens == expected.tokens
    assert (result.prefill, result.prefill_computed) == ("sparge:tau=1.0:lam=inf:int8=False", 1.0)


def test_generation_with_a_sparse_prefill():
    pair = tiny_pair("llama")
    result = generate(pair, [TEXT], prefill="sparge:theta=0.2:tau=0.5", method="dense", max_new_tokens=4)[0]
    assert result.error is None and result.prefill == "sparge:theta=0.2:tau=0.5"
    assert 0.1 < result.prefill_computed < 0.99


def test_evaluation_shows_what_the_prefill_costs():
    pair, documents = tiny_pair("llama"), [Document("runs", TEXT)]

    def kl(prefill: str) -> float:
        (result,) = evaluate(pair, documents, [parse_method("dense")], prefill=prefill, context=470, rows=40)
        assert result.prefill == parse_prefill(prefill).spec()
        return result.kl

    assert abs(kl(EXACT)) < 1e-6
    assert 1e-5 < kl("sparge:theta=0.2:tau=0.9:int8=false") < kl("sparge:theta=0.2:tau=0.3:int8=false")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparge:theta=1.1", r"sparge: theta=1.1 is outside \[-1, 1\].*theta=0.6"),
        ("sparge:theta=-2", "theta=-2"),
        ("sparge:tau=0", r"sparge: tau=0.0 is outside \(0, 1\]"),
        ("sparge:tau=1.01", "tau=1.01"),
        ("sparge:lam=0", "sparge: lam=0.0 is not above 0.*lam=50"),
        ("sparge:lam=-50", "lam=-50"),
        ("sparge:lam=nan", "lam=nan"),
        ("sparge:lambda=50", r"no option 'lambda' \(did you mean 'lam'\?\)"),
        ("sparge:int8=maybe", "int8='maybe' is not of type bool"),
        ("sparge:tuned=f.json:tau=0.9", "tuned=f.json brings its own"),
        ("spagre", "did you mean 'sparge'"),
    ],
)
def test_options_that_cannot_be_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_prefill(text)


def test_a_head_size_without_tiles_is_refused_before_any_work():
    model = tiny_model("llama", head_dim=20)
    with pytest.raises(UsageError, match="head_dim=20 is not supported"):
        Sparge().check(model.config)
    Sparge().check(tiny_model("llama", head_dim=64).config)


def test_the_text_makes_the_method_again():
    for text in (
        "sparge",
        "sparge:theta=0.5:tau=0.9",
        "sparge:lam=inf",
        "sparge:int8=False",
        "sparge:tuned=a.json",
    ):
        assert parse_prefill(text).spec() == text
        assert parse_prefill(parse_prefill(text).spec()) == parse_prefill(text)
