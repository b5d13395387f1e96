"""``self``: what the last dense pass attended to, and every token since, in lists and in the lossless mode."""

from __future__ import annotations

import pytest
import torch
from masked_model import attention_weights
from test_matrix import LENGTHS, make, prepared, stored_scores
from tiny import tiny_pair

from specattn.dropin import sparse_attention
from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.pairs import Pair
from specattn.request import Request
from specattn.selection.registry import parse_method
from specattn.target_scores import LAST_ROWS

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("p,sink,window", [(0.5, 0, 0), (0.8, 2, 3), (0.3, 4, 16)])
def test_the_lists_are_the_smallest_of_that_mass_and_all_since(p, sink, window):
    method, round = make(f"self:p={p}:sink={sink}:window={window}", 3)
    state = prepared(method, round)
    selection, scores = method.prepare(state), stored_scores(round)
    for request, length in enumerate(LENGTHS):
        known = int(scores.positions[request])
        for layer in range(3):
            for head in range(2):
                weights = scores.probabilities[request, layer, head, :known].double().tolist()
                forced = {t for t in range(known) if t < sink or t >= known - window}
                chosen, heaviest = set(forced), sorted(set(range(known)) - forced, key=lambda t: -weights[t])
                while sum(weights[t] for t in chosen) < p * sum(weights) - 1e-9:
                    chosen.add(heaviest.pop(0))
                chosen |= set(range(known, length + round.rows))
                found = selection.indices[request, layer, head]
                assert found[found >= 0].tolist() == sorted(chosen)


def test_reading_the_scores_is_counted():
    method, round = make("self", 3)
    selection = method.select(round.layer(method, 2, prepared(method, round)))
    # Two bytes for each KV head and token before the pass.
    assert selection.extra_bytes.tolist() == [max(0, length - 9) * 2 * 2 for length in LENGTHS]


def test_each_dense_pass_leaves_the_scores_of_the_rows_that_stood():
    pair = tiny_pair("qwen2")
    alone = Pair(pair.name, pair.target, None, pair.tokenizer)
    prompts, moved = [PROMPT, PROMPT[:9]], 0
    with Engine(
        alone, method="self:p=0.6", max_batch=2, max_tokens=200, lossless=True, lossless_every=5
    ) as engine:
        for prompt in prompts:
            engine.submit(Request(prompt, 40, ignore_eos=True))
        engine.advance()
        for _ in range(4):
            starts = {active.slot: active.length for active in engine._active.values()}
            engine.advance()
            scores = engine.speculator.sparse.scores
            for active in engine._active.values():
                start, tokens = starts[active.slot], [*active.request.prompt, *active.tokens]
                assert int(scores.positions[active.slot]) == start
                assert int(scores.ends[active.slot]) == len(tokens) - 1
                expected = plain_scores(pair.target, tokens[:-1], start)
                assert error_ratio(scores.probabilities[active.slot, ..., :start].float(), expected) < 2**-8
                moved += len(tokens) - 1 - start
    assert moved > 8, "some passes had several rows that stood"


def plain_scores(model, tokens: list[int], start: int) -> torch.Tensor:
    """``[layers, kv_heads, start]``: what rows from ``start`` on attend to of what is before them, on average."""
    context = attention_weights(model, tokens)[:, :, start:, :start][:, :, -LAST_ROWS:]
    context = context * (context.shape[2] / LAST_ROWS)
    return context.unflatten(1, (model.config.num_key_value_heads, -1)).mean((2, 3))


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match=r"p=1.5 is outside \(0, 1\]"):
        parse_method("self:p=1.5")
    with pytest.raises(UsageError, match="sink=-1"):
        parse_method("self:sink=-1")
    with pytest.raises(UsageError, match="lossless"), sparse_attention(tiny_pair("llama").target, "self"):
        pass
