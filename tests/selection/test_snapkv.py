"""SnapKV against a plain reading of its paper."""

from __future__ import annotations

import pytest
import torch
from decoding import decode
from eviction_papers import Forgetful, heads, snapkv, windows
from tiny import tiny_model

from specattn.cache import PagedKVCache
from specattn.errors import UsageError
from specattn.selection.registry import parse_method

TOKENS = torch.randint(3, 90, (90,), generator=torch.Generator().manual_seed(8)).tolist()
PROMPT = 70
ROUNDS = [1, 4, 3, 1, 5, 5]
OPTIONS = [
    {"budget": 20, "window": 8, "kernel": 5, "pooling": "max", "gqa": "mean"},
    {"budget": 30, "window": 3, "kernel": 7, "pooling": "avg", "gqa": "mean"},
    {"budget": 17, "window": 16, "kernel": 1, "pooling": "avg", "gqa": "max"},
    {"budget": 25, "window": 1, "kernel": 3, "pooling": "max", "gqa": "max"},
]


def text(options: dict[str, object]) -> str:
    return ":".join(["snapkv", *(f"{name}={value}" for name, value in options.items())])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What every compaction keeps."""
    seen: list[torch.Tensor] = []
    real = PagedKVCache.compact

    def compact(self, slot, lists):
        seen.append(lists)
        real(self, slot, lists)

    monkeypatch.setattr(PagedKVCache, "compact", compact)
    return seen


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
def test_the_paper_keeps_the_same_tokens(model_type, options, kept):
    model = tiny_model(model_type)
    decoded = decode(model, text(options), TOKENS[:PROMPT], PROMPT, [])
    expected = snapkv(model, TOKENS[:PROMPT], **options)
    (lists,) = kept
    for layer, head in heads(model):
        assert lists[layer, head].tolist() == expected[layer, head]
    assert decoded.cache.length(decoded.slot) == options["budget"]
    assert len({tuple(tokens) for tokens in expected.values()}) > 1, "heads keep their own tokens"


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_decoding_forgets_what_was_dropped_and_keeps_true_positions(model_type, options):
    """Every later row against a model in which the dropped tokens are masked, head by head."""
    model = tiny_model(model_type)
    decoded = decode(model, text(options), TOKENS, PROMPT, ROUNDS)
    reference, length = Forgetful(model, TOKENS), PROMPT + sum(ROUNDS)
    reference.see(PROMPT, sum(ROUNDS), snapkv(model, TOKENS[:PROMPT], **options))
    expected = reference.run(length)[0][PROMPT - 1 :]
    dense = model(torch.tensor([TOKENS[:length]])).logits[0, PROMPT - 1 :]
    assert torch.allclose(decoded.logits, expected, atol=2e-3)
    assert not torch.allclose(expected[1:], dense[1:], atol=0.1)
    cache = decoded.cache
    assert cache.length(decoded.slot) == options["budget"] + sum(ROUNDS)
    assert cache.evicted(decoded.slot) == PROMPT - options["budget"]
    assert any(windows(model)) == (model_type == "gemma3_text")


def test_a_fraction_is_of_the_prompt_and_not_below_the_window():
    method = parse_method("snapkv:budget=0.25:window=10")
    assert [method.limit(n) for n in (100, 30, 12, 7)] == [25, 10, 10, 7]
    assert [method.observed(n) for n in (100, 12, 10, 7)] == [10, 10, 0, 0]


@pytest.mark.parametrize("prompt", [1, 5, 6])
def test_a_prompt_within_the_budget_stays_whole(prompt, kept):
    model = tiny_model("llama")
    decoded = decode(model, "snapkv:budget=6:window=5", TOKENS, prompt, ROUNDS)
    length = prompt + sum(ROUNDS)
    expected = model(torch.tensor([TOKENS[:length]])).logits[0, prompt - 1 :]
    assert torch.allclose(decoded.logits, expected, atol=1e-3)
    assert not kept


def test_the_defaults_are_the_papers():
    method = parse_method("snapkv")
    assert (method.window, method.kernel, method.pooling) == (32, 7, "max")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("budget=16", "budget=16 is below window=32, which is always kept"),
        ("budget=0", "budget=0.0"),
        ("window=0", "window=0 is below 1"),
        ("kernel=4", "kernel=4 is even"),
        ("kernel=0", "kernel=0 is below 1"),
        ("pooling=mean", "choose one of max, avg"),
        ("gqa=union", "choose one of mean, max"),
        ("dense_layers=2", "dense_layers=2 cannot be kept"),
    ],
)
def test_refusals_name_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        parse_method(f"snapkv:{options}")
