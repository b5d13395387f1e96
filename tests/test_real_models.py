"""Real weights of two architectures through the engine: a Llama and a Gemma 3 with sliding-window layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.mapping.calibrate import calibrate
from specattn.pairs import Pair, load_pair
from specattn.selection.registry import parse_method

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "examples" / "carnacki.txt").read_text()[:13_000]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def pair(request):
    """The model as its own draft, in float32: with exact arithmetic token-for-token claims can be made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPECATTN_CACHE", raising=False)
        loaded = load_pair(target=request.param, device="cpu")
    model = loaded.target.float()
    return Pair(request.param, model, model, loaded.tokenizer)


def prompt(pair: Pair, count: int) -> list[int]:
    return pair.tokenizer(TEXT)["input_ids"][:count]


def greedy(pair: Pair, tokens: list[int], count: int) -> list[int]:
    output = pair.target.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(tokens) :].tolist()


def test_dense_speculation_and_plain_decoding_equal_transformers(pair):
    # Longer than Gemma's window of 512 tokens.
    tokens = prompt(pair, 600)
    expected = greedy(pair, tokens, 24)
    plain = Pair(pair.name, pair.target, None, pair.tokenizer)
    for each in (pair, plain):
        (result,) = generate(each, [tokens], method="dense", max_new_tokens=24, ignore_eos=True)
        assert result.tokens == expected
    (full,) = generate(plain, [tokens], method="oracle:p=1", max_new_tokens=24, ignore_eos=True)
    assert full.tokens == expected


def test_a_calibrated_map_keeps_close_to_dense_and_reads_less(pair):
    tokens = prompt(pair, 1200)
    mapping = calibrate(pair, [tokens], tokens=700, rounds=8, heads=16)
    assert mapping.metadata.kl_heads < mapping.metadata.kl_layer_map
    methods = [parse_method(name) for name in ("specattn:p=0.9", "streaming:budget=0.1")]
    document = Document("examples", tokens)
    specattn, streaming = evaluate(pair, [document], methods, context=1000, rows=30, mapping=mapping)
    assert specattn.kv_read_fraction < 0.9
    assert specattn.attention_mass > 0.8
    assert specattn.kl < streaming.kl


def test_lossless_equals_transformers_with_fewer_dense_reads(pair):
    tokens = prompt(pair, 600)
    expected = greedy(pair, tokens, 24)
    plain = Pair(pair.name, pair.target, None, pair.tokenizer)
    (result,) = generate(
        plain, [tokens], method="self:p=0.9", lossless=True, max_new_tokens=24, ignore_eos=True
    )
    assert result.tokens == expected
    assert result.lossless.dense_reads_per_token < 0.5
