"""The small built-in models with their real weights."""

from __future__ import annotations

import pytest
import torch

from specattn.pairs import load_pair


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """The user's own cache: converting anew would take a minute."""
    monkeypatch.delenv("SPECATTN_CACHE", raising=False)


def answer(name: str, prompt: str, tokens: int) -> str:
    pair = load_pair(target=name, device="cpu")
    inputs = pair.tokenizer(prompt, return_tensors="pt")
    output = pair.target.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return pair.tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


@pytest.mark.slow
def test_smollm2_knows_a_capital():
    assert answer("smollm2-135m", "The capital of France is", 4).startswith(" Paris")


@pytest.mark.slow
def test_gemma3_writes_text_and_its_layers_alternate():
    pair = load_pair(target="gemma3-270m", device="cpu")
    assert pair.target.config.layer_types.count("full_attention") == 3
    assert pair.target.config.sliding_window == 512
    assert pair.tokenizer("one two").input_ids[0] == pair.tokenizer.bos_token_id
    assert {pair.tokenizer.convert_ids_to_tokens(i) for i in pair.eos_token_ids} == {"<eos>", "<end_of_turn>"}
    assert "Tuesday" in answer("gemma3-270m", "The days of the week are Sunday, Monday,", 4)


@pytest.mark.slow
def test_smollm2_stops_at_the_end_of_its_turn():
    pair = load_pair(target="smollm2-135m", device="cpu")
    assert {pair.tokenizer.convert_ids_to_tokens(i) for i in pair.eos_token_ids} == {
        "<|im_end|>",
        "<|endoftext|>",
    }
    chat = [{"role": "user", "content": "Say hello."}]
    ids = pair.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = pair.target.generate(**ids, max_new_tokens=60, do_sample=False)
    assert int(output[0, -1]) in pair.eos_token_ids
