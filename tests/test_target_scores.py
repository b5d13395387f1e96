"""The target's scores of dense passes, against transformers' own eager attention; what rollback leaves of them."""

from __future__ import annotations

import pytest
import torch
from masked_model import attention_weights
from tiny import tiny_mapping, tiny_pair

from specattn.engine import Engine
from specattn.generation import generate
from specattn.kernels.check import error_ratio
from specattn.pairs import Pair
from specattn.request import Request
from specattn.target_scores import LAST_ROWS, SCORED_ROWS

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
BOTH = "specattn:p=1:signals=both:dense_layers=0"


def plain_scores(model, tokens: list[int], start: int, rows: int) -> torch.Tensor:
    """``[layers, kv_heads, start]``: what rows from ``start`` on attend to of what is before them, on average."""
    context = attention_weights(model, tokens)[:, :, start : start + rows, :start][:, :, -LAST_ROWS:]
    context = context * (context.shape[2] / LAST_ROWS)
    return context.unflatten(1, (model.config.num_key_value_heads, -1)).mean((2, 3))


def follow(pair: Pair, method: str, count: int):
    """Decode, and yield after each round the text, the scores' position, the scores and the rows that stood."""
    engine = Engine(pair, method=method, mapping=tiny_mapping(pair), max_tokens=len(PROMPT) + count)
    with engine:
        engine.submit(Request(PROMPT, count, ignore_eos=True))
        tokens, done = list(PROMPT), False
        while not done:
            updates = engine.advance()
            scores = engine.speculator.scores
            for update in updates:
                tokens += update.tokens
                done = update.result is not None
            position = int(scores.positions[0])
            yield tokens, position, scores.probabilities[0, ..., :position].float(), len(updates[-1].tokens)


@pytest.mark.parametrize("accepted", ["all", "few"])
def test_scores_are_those_of_the_prompts_end_and_of_refreshed_rounds(accepted):
    """Everything is read, so that every pass could be compared; only every second round's scores are taken."""
    pair = tiny_pair("qwen2")
    if accepted == "all":
        pair = Pair(pair.name, pair.target, pair.target, pair.tokenizer)
    seen, length = [], len(PROMPT)
    for tokens, position, scores, new in follow(pair, f"{BOTH}:refresh=2", 26):
        if not seen:  # the first round follows the prompt at once, and is not the second
            assert position == len(PROMPT) - SCORED_ROWS
            expected = plain_scores(pair.target, PROMPT, position, SCORED_ROWS)
        elif position != seen[-1]:
            # The pass began with the pending token; as many rows stood as there are new tokens.
            assert position == length
            expected = plain_scores(pair.target, tokens, position, new)
        assert error_ratio(scores, expected) < 2**-8
        seen.append(position)
        length = len(tokens) - 1
    assert len(seen) >= 4
    assert all((seen[i] != seen[i - 1]) == (i % 2 == 1) for i in range(1, len(seen)))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_refreshing_every_round_is_dense(model_type):
    pair = tiny_pair(model_type)
    options = {"mapping": tiny_mapping(pair), "max_new_tokens": 20, "ignore_eos": True}
    (dense,) = generate(pair, [PROMPT], method="dense", **options)
    (both,) = generate(pair, [PROMPT], method="specattn:p=0.3:signals=both:refresh=1", **options)
    assert both.tokens == dense.tokens
    assert both.kv_read_fraction == 1


def test_neighbours_change_nothing():
    """Each request refreshes in its own turn, whoever else is in the batch."""
    pair = tiny_pair("llama")
    prompts = [PROMPT[:1], PROMPT[:11], PROMPT, PROMPT[5:33]]
    options = {"mapping": tiny_mapping(pair), "ignore_eos": True, "max_batch": 3, "max_new_tokens": 15}
    method = "specattn:p=0.4:signals=both:refresh=3:sink=1:window=2"
    together = generate(pair, prompts, method=method, **options)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = generate(pair, [prompt], method=method, **options)
        assert result.tokens == alone.tokens
        assert result.kv_read_fraction == pytest.approx(alone.kv_read_fraction)


def test_a_refresh_costs_a_full_read():
    pair = tiny_pair("llama")
    options = {"mapping": tiny_mapping(pair), "ignore_eos": True, "max_new_tokens": 30}
    fractions = [
        generate(pair, [PROMPT], method=f"specattn:p=0.3:signals=both:refresh={n}", **options)[
            0
        ].kv_read_fraction
        for n in (0, 6, 2, 1)
    ]
    assert fractions == sorted(fractions) and fractions[0] < fractions[-1] == 1
