"""Pairs of loaded models: the same checks, and those that need the modules themselves."""

from __future__ import annotations

import pytest
import torch
from tiny import MODEL_TYPES, tiny_model, tiny_pair, tiny_tokenizer

from specattn.errors import UsageError
from specattn.pairs import make_pair

SMALL = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_supported_architecture_makes_a_pair(model_type):
    pair = tiny_pair(model_type)
    assert pair.target.config.model_type == pair.draft.config.model_type == model_type
    assert pair.eos_token_ids == {pair.tokenizer.eos_token_id}
    assert repr(pair) == f"Pair(name='tiny-{model_type}', mapping_file=None)"


def test_a_model_may_be_its_own_draft():
    model = tiny_model("llama")
    pair = make_pair(model, model, tiny_tokenizer())
    assert pair.target is pair.draft is model


def test_models_are_set_to_inference():
    target = tiny_model("llama").train().requires_grad_(True)
    pair = make_pair(target, None, tiny_tokenizer())
    assert pair.target is target and not target.training
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert pair.name == "llama"


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        ({}, {"layers": 4}, "must not be larger"),
        ({"vocab": 128}, SMALL | {"vocab": 64}, "cannot share a tokenizer"),
        ({}, SMALL | {"dtype": torch.bfloat16}, r"in torch\.float32, the draft on cpu in torch\.bfloat16"),
    ],
)
def test_models_that_do_not_fit_are_refused(target, draft, message):
    with pytest.raises(UsageError, match=message):
        make_pair(tiny_model("llama", **target), tiny_model("llama", **draft), tiny_tokenizer())


@pytest.mark.parametrize("role", ["target", "draft"])
def test_unsupported_architectures_are_refused_in_either_role(role):
    models = {"target": tiny_model("llama"), "draft": tiny_model("llama", **SMALL)}
    models[role].config.attn_logit_softcapping = 30.0
    with pytest.raises(UsageError, match="soft-capping"):
        make_pair(models["target"], models["draft"], tiny_tokenizer())


def test_attention_sinks_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UsageError, match=r"model\.layers\.1\.self_attn has attention sinks"):
        make_pair(model, None, tiny_tokenizer())


def test_attention_that_is_not_causal_is_refused():
    model = tiny_model("qwen3")
    model.model.layers[2].self_attn.is_causal = False
    with pytest.raises(UsageError, match=r"model\.layers\.2\.self_attn has attention that is not causal"):
        make_pair(model, None, tiny_tokenizer())


def test_layers_of_an_unknown_kind_are_refused():
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "chunked_attention", "linear_attention"]
    with pytest.raises(UsageError, match="layers of type chunked_attention, linear_attention"):
        make_pair(model, None, tiny_tokenizer())
