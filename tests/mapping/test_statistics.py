"""Sampled rounds against the attention weights that transformers reports itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODEL_TYPES, tiny_pair
from torch import Tensor
from transformers import PreTrainedModel

from specattn.attention import attached
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.mapping import statistics
from specattn.mapping.samples import RoundSample
from specattn.mapping.statistics import collect, round_positions, statistics_bytes
from specattn.pairs import Pair

TOKENS = torch.randint(3, 90, (150,), generator=torch.Generator().manual_seed(4)).tolist()
ROUNDS, GAMMA = 7, 3
BF16 = 2.0**-8
"""Half a unit in the last place, relative."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def samples_of(pair: Pair, tokens: list[int] = TOKENS, **options) -> list[RoundSample]:
    options = {"rounds": ROUNDS, "gamma": GAMMA, "generator": seeded(), **options}
    with attached(*pair.models):
        return collect(pair, tokens, **options)


def eager_attention(model: PreTrainedModel) -> Tensor:
    """``[layers * heads, tokens, tokens]``."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([TOKENS]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.cat([layer[0] for layer in attentions])


def direct(weights: Tensor, n: int, rows: int) -> Tensor:
    """The mean over the round's rows, over the context alone."""
    context = sum(weights[:, row, :n] for row in range(n, n + rows)) / rows
    return context / context.sum(-1, keepdim=True)


CHUNKS = [("qwen2", 16), ("qwen2", 512), ("gemma3_text", 16), ("gemma3_text", 512)]


@pytest.mark.parametrize(("model_type", "chunk"), [*((name, 37) for name in MODEL_TYPES), *CHUNKS])
def test_a_sample_is_the_mean_attention_of_its_rows(model_type, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    pair = tiny_pair(model_type)
    samples = samples_of(pair)
    positions = round_positions(len(TOKENS), ROUNDS, GAMMA + 1, seeded())
    assert [sample.target.shape[1] for sample in samples] == positions
    assert chunk == 512 or len({n // chunk for n in positions}) > 2
    target, draft = eager_attention(pair.target), eager_attention(pair.draft)
    for n, sample in zip(positions, samples, strict=True):
        for got, expected in (
            (sample.target, direct(target, n, GAMMA + 1)),
            (sample.draft, direct(draft, n, GAMMA)),
        ):
            assert got.dtype == torch.bfloat16
            assert got.shape == expected.shape
            errors = [error_ratio(head, exact) for head, exact in zip(got, expected, strict=True)]
            assert max(errors) < BF16


def test_the_last_row_and_the_number_of_rows_count():
    """The comparison above tells one row more or less: the draft has no row for its last proposal."""
    pair = tiny_pair("qwen2")
    (n, *_), (sample, *_) = round_positions(len(TOKENS), ROUNDS, GAMMA + 1, seeded()), samples_of(pair)
    target, draft = eager_attention(pair.target), eager_attention(pair.draft)
    assert error_ratio(sample.target, direct(target, n, GAMMA)) > 10 * BF16
    assert error_ratio(sample.draft, direct(draft, n, GAMMA + 1)) > 10 * BF16


def test_a_sliding_window_layer_is_zero_outside_its_window():
    pair = tiny_pair("gemma3_text")
    heads = pair.target.config.num_attention_heads
    window = pair.target.config.sliding_window
    kinds = pair.target.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    for sample in samples_of(pair):
        n = sample.target.shape[1]
        assert n > window
        for layer, kind in enumerate(kinds):
            outside = sample.target[layer * heads : (layer + 1) * heads, : n - window + 1]
            assert (outside > 0).any() == (kind == "full_attention")


def test_every_distribution_sums_to_one():
    for sample in samples_of(tiny_pair("llama")):
        for rows in (sample.target, sample.draft):
            assert torch.allclose(rows.float().sum(-1), torch.ones(len(rows)), atol=BF16)


def test_progress_reports_every_token_of_both_models(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 64)
    seen: list[tuple[str, int]] = []
    samples_of(tiny_pair("llama"), progress=lambda role, count: seen.append((role, count)))
    assert seen == [(role, count) for role in ("target", "draft") for count in (64, 64, 22)]


@given(
    st.integers(1, 3000), st.integers(1, 150), st.integers(1, 20), st.integers(20, 700), st.integers(0, 99)
)
def test_rounds_lie_inside_the_text_and_inside_a_chunk(tokens, rounds, rows, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    first = max(tokens // 8, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "CHUNK", chunk)
        if tokens - rows - first < rounds:
            with pytest.raises(UsageError, match=f"{tokens} tokens are too few to sample {rounds} rounds"):
                round_positions(tokens, rounds, rows, generator)
            return
        positions = round_positions(tokens, rounds, rows, generator)
    assert positions == sorted(set(positions))
    assert 1 <= len(positions) <= rounds
    assert all(first - rows < n and n > 0 and n + rows <= tokens for n in positions)
    assert all(n // chunk == (n + rows - 1) // chunk for n in positions)


def test_rounds_are_spread_over_the_text():
    positions = round_positions(4096, 128, 5, seeded())
    width = (4096 - 5 - 512) / 128
    assert len(positions) == 128
    for number, n in enumerate(positions):
        assert 512 + number * width - 5 <= n < 512 + (number + 1) * width
    other = round_positions(4096, 128, 5, torch.Generator().manual_seed(2))
    assert other != positions == round_positions(4096, 128, 5, seeded())


def test_a_text_too_short_is_refused_before_any_pass(monkeypatch):
    pair = tiny_pair("llama")
    monkeypatch.setattr(type(pair.target), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="use a longer text or fewer rounds"):
        samples_of(pair, TOKENS[:20])


def test_the_memory_estimate_is_that_of_the_samples():
    pair = tiny_pair("llama")
    geometries = [KVGeometry.from_config(model.config, model.dtype) for model in pair.models]
    estimate = statistics_bytes(*geometries, len(TOKENS), ROUNDS)
    kept = sum(sample.target.nbytes + sample.draft.nbytes for sample in samples_of(pair))
    assert kept == pytest.approx(estimate, rel=0.1)


def test_a_real_pair_needs_less_than_two_gibibytes():
    target = KVGeometry(layers=28, query_heads=12, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    draft = KVGeometry(layers=24, query_heads=14, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    needed = 2 * statistics_bytes(target, draft, tokens=4096, rounds=128)
    assert 0.5 * 2**30 < needed < 2 * 2**30
