"""H2O against a plain reading of its paper."""

from __future__ import annotations

import pytest
import torch
from decoding import decode
from eviction_papers import H2OReading, heads
from tiny import tiny_model

from specattn.errors import UsageError
from specattn.kernels import received_attention
from specattn.selection.registry import parse_method

TOKENS = torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(8)).tolist()
PROMPT = 40
ROUNDS = [1, 4, 3, 1, 5, 5]
OPTIONS = [
    {"budget": 20, "heavy": 0.5, "every": 1},
    {"budget": 0.3, "heavy": 0.75, "every": 1},
    {"budget": 44, "heavy": 0.5, "every": 1},  # begins to evict while decoding
    {"budget": 17, "heavy": 0.0, "every": 4},
    {"budget": 18, "heavy": 1.0, "every": 6},
]


def text(options: dict[str, float]) -> str:
    return ":".join(["h2o", *(f"{name}={value}" for name, value in options.items())])


def assert_same(model, options, decoded, rounds) -> None:
    """Logits of every row, and the scores of what is left, against the reading."""
    reading = H2OReading(model, **options)
    expected = reading.read(TOKENS, PROMPT, rounds)[PROMPT - 1 :]
    assert torch.allclose(decoded.logits, expected, atol=2e-3)
    scores = decoded.speculator.eviction.scores[decoded.slot]
    for layer, head in heads(model):
        if layer in scores.layers:
            # In the order of the kept tokens: equal scores are those of equal tokens.
            left = [reading.scores[layer, head][token] for token in reading.kept[layer, head]]
            assert torch.allclose(scores.layers[layer][head], torch.tensor(left), atol=1e-3)
    dense = model(torch.tensor([TOKENS[: PROMPT + sum(rounds)]])).logits[0, PROMPT - 1 :]
    assert not torch.allclose(expected, dense, atol=0.1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rejected", [0, 3])
def test_scores_and_logits_are_the_papers(options, rejected):
    """Rejected rows leave no trace, in the scores as little as in the cache."""
    model = tiny_model("llama")
    decoded = decode(model, text(options), TOKENS, PROMPT, ROUNDS, rejected)
    assert_same(model, options, decoded, ROUNDS)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("rounds", [[1] * 19, ROUNDS])
def test_other_models_plain_and_in_rounds(model_type, rounds):
    model = tiny_model(model_type)
    decoded = decode(model, text(OPTIONS[0]), TOKENS, PROMPT, rounds)
    assert_same(model, OPTIONS[0], decoded, rounds)
    assert decoded.cache.length(decoded.slot) == 20


def test_a_prompt_in_pieces_is_scored_as_a_whole(monkeypatch):
    """Pieces of 16 tokens, and blocks of 5 rows at most."""
    model = tiny_model("llama")
    monkeypatch.setattr("specattn.runner.default_chunk", lambda device: 16)
    monkeypatch.setattr(received_attention, "BLOCK", 4 * 40 * 5)
    decoded = decode(model, text(OPTIONS[0]), TOKENS, PROMPT, ROUNDS)
    assert_same(model, OPTIONS[0], decoded, ROUNDS)


def test_the_cache_stays_within_the_budget():
    model = tiny_model("llama")
    for every in (1, 5):
        lengths = []
        for rounds in range(1, 20):
            decoded = decode(model, f"h2o:budget=16:every={every}", TOKENS, PROMPT, [1] * rounds)
            lengths.append(decoded.cache.length(decoded.slot))
        assert set(lengths) == set(range(16, 16 + every))
    assert [parse_method("h2o:budget=0.25").limit(n) for n in (4, 100, 400)] == [1, 25, 100]


def test_a_full_budget_is_dense():
    model = tiny_model("llama")
    decoded = decode(model, "h2o:budget=1", TOKENS, PROMPT, ROUNDS)
    expected = model(torch.tensor([TOKENS[:59]])).logits[0, PROMPT - 1 :]
    assert torch.allclose(decoded.logits, expected, atol=1e-3)
    assert decoded.cache.evicted(decoded.slot) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("budget=0", "budget=0.0"),
        ("heavy=1.5", r"heavy=1.5 is outside \[0, 1\]"),
        ("heavy=nan", r"heavy=nan is outside \[0, 1\]"),
        ("every=0", "every=0 is below 1"),
        ("dense_layers=1", "dense_layers=1 cannot be kept"),
        ("window=3", "no option 'window'"),
    ],
)
def test_refusals_name_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        parse_method(f"h2o:{options}")
