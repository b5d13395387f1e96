"""Sparse attention inside transformers' ``generate``: what it computes, and that it leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from tiny import MODEL_TYPES, PAD, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from specattn import dropin
from specattn.dropin import sparse_attention
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.selection.registry import parse_method

PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
BATCHES = {
    "one": [PROMPT],
    "one of a few tokens": [PROMPT[:9]],
    "one of one token": [PROMPT[:1]],
    "ragged": [PROMPT[3:20], PROMPT, PROMPT[:7]],
    "ragged of few tokens": [PROMPT[:9], PROMPT[3:7], PROMPT[20:21]],
}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}
FULL = [
    "streaming:budget=1.0:dense_layers=0",
    "oracle:p=1:dense_layers=0",
    "quest:budget=1.0:dense_layers=0",
    "twilight:base=full:p=1:dense_layers=0",
]
SPARSE = [
    "streaming:budget=0.3",
    "random:budget=0.4:sink=2:window=2",
    "streaming:budget=6:sink=2:dense_layers=0",
    "oracle:p=0.6:dense_layers=1",
    "quest:budget=0.3:page=4",
    "twilight:base=(quest:budget=0.5:page=4):p=0.6:dense_layers=1",  # at .7 the rounding of a CPU may decide
]
COUNT = 8


def greedy(model: PreTrainedModel, prompts: list[list[int]], **options) -> list[list[int]]:
    """New tokens of each prompt; the batch is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        **options,
    )
    return output[:, width:].tolist()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The layer and the number of rows of every sparse attention call."""
    seen: list[tuple[int, int]] = []
    real = dropin._DropIn.attend

    def attend(self, layer, query, context, scaling):
        seen.append((layer, query.shape[2]))
        return real(self, layer, query, context, scaling)

    monkeypatch.setattr(dropin._DropIn, "attend", attend)
    return seen


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_full_selection_equals_dense_token_for_token(model_type, cache, batch, calls):
    model = tiny_model(model_type)
    expected = greedy(model, BATCHES[batch], **CACHES[cache])
    for method in FULL:
        with sparse_attention(model, method):
            assert greedy(model, BATCHES[batch], **CACHES[cache]) == expected
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    full = {layer for layer, kind in enumerate(kinds[:3]) if kind == "full_attention"}
    if model_type == "mistral":
        assert model.config.sliding_window is None
    assert {layer for layer, _ in calls} == full, "sliding-window layers stay as they are"
    assert {rows for _, rows in calls} == {1}, "prefill is dense"
    assert len(calls) == len(FULL) * len(full) * (COUNT - 1)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_beam_search(model_type, method, calls):
    """Beams are reordered in the model's own cache, which selection reads."""
    model = tiny_model(model_type)
    options = {"num_beams": 3, "num_return_sequences": 3}
    for batch in ("one", "ragged"):
        expected = greedy(model, BATCHES[batch], **options)
        with sparse_attention(model, method):
            assert greedy(model, BATCHES[batch], **options) == expected
        assert expected[0] != expected[1]
    assert calls


@pytest.mark.parametrize("method", FULL)
def test_passes_of_several_rows(method, calls):
    """Prompt lookup, transformers' own speculation, verifies several tokens at once."""
    model = tiny_model("qwen2")
    prompt = PROMPT[:10] * 3
    with sparse_attention(model, method):
        assert greedy(model, [prompt], prompt_lookup_num_tokens=4) == greedy(model, [prompt])
    assert max(rows for _, rows in calls) > 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("method", SPARSE)
def test_a_budget_gives_the_tokens_of_the_engines_plain_decoding(method, model_type):
    model = tiny_model(model_type, layers=4)
    pair = Pair("plain", model, None, tiny_tokenizer())
    for batch in ("one", "ragged"):
        prompts = BATCHES[batch]
        results = generate(pair, prompts, method=method, max_new_tokens=COUNT, ignore_eos=True)
        with sparse_attention(model, method):
            for cache in CACHES.values():
                assert greedy(model, prompts, **cache) == [result.tokens for result in results]
        assert results[0].kv_read_fraction < 1


@pytest.mark.parametrize("method", SPARSE)
def test_a_budget_changes_the_tokens_but_not_the_first(method):
    """The first token comes from the prefill, which is dense."""
    model = tiny_model("llama", layers=4)
    dense = greedy(model, BATCHES["ragged"])
    with sparse_attention(model, method):
        sparse = greedy(model, BATCHES["ragged"])
    assert [row[0] for row in sparse] == [row[0] for row in dense]
    assert sparse != dense


def test_options_with_a_name():
    model = tiny_model("llama", layers=4)
    outputs = []
    for method, options in [
        ("streaming", {"budget": 6, "sink": 2}),
        ("streaming:budget=6", {"sink": 2}),
        (parse_method("streaming:budget=6:sink=2"), {}),
        ("streaming", {}),
    ]:
        with sparse_attention(model, method, **options) as inside:
            assert inside is model
            outputs.append(greedy(model, [PROMPT]))
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_the_dense_method_is_dense(calls):
    model = tiny_model("gemma3_text")
    with sparse_attention(model, "dense"):
        inside = greedy(model, BATCHES["ragged"])
    assert inside == greedy(model, BATCHES["ragged"])
    assert not calls


def traces(model: PreTrainedModel) -> list[str]:
    """Modules on which a block has left something."""
    return [name for name, module in model.named_modules() if "_specattn" in vars(module)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_is_left_behind(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    before = greedy(model, [PROMPT])
    with sparse_attention(model, "streaming:budget=5:dense_layers=0"):
        assert model.config._attn_implementation == dropin.IMPLEMENTATION
        assert traces(model)
        assert greedy(model, [PROMPT]) != before
    assert model.config._attn_implementation == implementation
    assert not traces(model)
    assert greedy(model, [PROMPT]) == before


def test_nothing_is_left_behind_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="on purpose"), sparse_attention(model, "streaming"):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"
    assert not traces(model)


def test_a_block_within_a_block():
    model = tiny_model("llama")
    outer, inner = "streaming:budget=5:dense_layers=0", "oracle:p=0.5:dense_layers=0"
    alone = []
    for method in (outer, inner):
        with sparse_attention(model, method):
            alone.append(greedy(model, [PROMPT]))
    assert alone[0] != alone[1]
    with sparse_attention(model, outer):
        with pytest.raises(RuntimeError), sparse_attention(model, inner):
            assert greedy(model, [PROMPT]) == alone[1]
            raise RuntimeError
        assert greedy(model, [PROMPT]) == alone[0]
    assert model.config._attn_implementation == "sdpa"
    assert not traces(model)


def test_two_models_at_once():
    first, second = tiny_model("llama"), tiny_model("qwen2", seed=1)
    method = "streaming:budget=5:dense_layers=0"
    with sparse_attention(first, method):
        alone = greedy(first, [PROMPT])
    with sparse_attention(first, method), sparse_attention(second, method):
        greedy(second, [PROMPT[:20]])
        assert greedy(first, [PROMPT]) == alone
        assert not set(traces(first)) ^ set(traces(second))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("specattn", {}, "specattn.generate"),
        ("specattn-paper", {}, "specattn.generate"),
        ("twilight:base=specattn", {}, "specattn.generate"),
        ("quset", {}, "unknown method 'quset' .did you mean 'quest'"),
        ("streaming:p=1", {}, "no option 'p'"),
        ("streaming", {"sinks": 1}, "did you mean 'sink'"),
        (parse_method("streaming"), {"budget": 0.5}, "options budget go with a method's name"),
    ],
)
def test_refusals(method, options, message):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=message), sparse_attention(model, method, **options):
        pass
    assert model.config._attn_implementation == "sdpa"
    assert not traces(model)


def test_attention_that_is_not_implemented_is_refused():
    """What our kernels would silently leave out: soft-capping, and sinks in the module."""
    capped = tiny_model("gemma3_text")
    capped.config.attn_logit_softcapping = 30.0
    sinks = tiny_model("llama")
    sinks.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    for model, message in ((capped, "soft-capping"), (sinks, r"layers\.1\.self_attn has attention sinks")):
        with pytest.raises(UsageError, match=message), sparse_attention(model, "streaming"):
            pass
        assert model.config._attn_implementation == "sdpa"


def test_padding_between_tokens_is_refused():
    """Selection counts positions from a request's first token."""
    model = tiny_model("llama")
    mask = torch.tensor([[1] * 40, [1] * 30 + [0] * 10])
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    method = "streaming:dense_layers=0"
    with pytest.raises(UsageError, match="pad the prompts on the left"), sparse_attention(model, method):
        model.generate(torch.tensor([PROMPT, PROMPT]), **options)
    assert model.config._attn_implementation == "sdpa"
