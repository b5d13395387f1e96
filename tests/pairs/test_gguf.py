"""Real GGUF files, tiny ones written here: the converted model computes the same, and nothing gets lost."""

from __future__ import annotations

import pytest
import torch
from gguf_file import IDS, TOKENS, write_gguf
from tiny import tiny_model

from specattn.errors import UsageError
from specattn.pairs import conversions, load_pair

SHAPE = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": len(TOKENS)}
PROMPT = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def write(tmp_path):
    def write(model=None, name="model.gguf", **options):
        return str(write_gguf(tmp_path / name, model or tiny_model("qwen2", **SHAPE), **options))

    return write


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_gguf_file_gives_the_model_that_was_written(write, model_type):
    model = tiny_model(model_type, **SHAPE)
    pair = load_pair(target=write(model), dtype="float32", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(pair.target(PROMPT).logits, model(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert pair.draft is None
    assert (pair.context_limit, pair.vocab_size) == (512, len(TOKENS))
    assert pair.target.config.tie_word_embeddings is False


def test_the_tokenizer_and_the_ends_of_an_answer_survive(write):
    pair = load_pair(target=write(), dtype="float32", device="cpu")
    ids = pair.tokenizer("the</s><|im_end|>").input_ids
    assert pair.tokenizer.decode(ids) == "the</s><|im_end|>"
    assert ids[1] == IDS["he"] and ids[-1] == IDS["<|im_end|>"]
    assert pair.eos_token_ids == {IDS["<|im_end|>"], IDS["<|endoftext|>"]}
    assert pair.tokenizer.eos_token == "<|im_end|>"
    assert pair.tokenizer.decode(ids, skip_special_tokens=True) == "the</s>"
    chat = pair.tokenizer.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False)
    assert chat == "<|im_start|>hey<|im_end|>"


def test_weights_are_converted_to_the_dtype_that_was_asked_for(write):
    file = write()
    dtypes = {load_pair(target=file, dtype=dtype, device="cpu").dtype for dtype in ("float32", "auto", None)}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert len([path for path in (conversions.cache_dir() / "models").iterdir() if path.is_dir()]) == 2


def test_the_second_load_does_not_convert(write, monkeypatch):
    file = write()
    first = load_pair(target=file, dtype="float32", device="cpu")
    monkeypatch.setattr(conversions.gguf, "convert_gguf", lambda *arguments: pytest.fail("converted again"))
    second = load_pair(target=file, dtype="float32", device="cpu")
    assert torch.equal(first.target(PROMPT).logits, second.target(PROMPT).logits)


def test_a_pair_of_gguf_file_and_folder(write, save, tmp_path):
    target = write()
    tokenizer = load_pair(target=target, dtype="float32", device="cpu").tokenizer
    draft = save("draft", tiny_model("llama", layers=1, **SHAPE), tokenizer)
    pair = load_pair(target=target, draft=draft, dtype="float32", device="cpu")
    assert pair.draft.config.model_type == "llama"
    assert pair.name == f"{target} + {draft}"


def test_a_file_that_is_no_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(UsageError, match=r"model\.gguf is not a readable GGUF file"):
        load_pair(target=tmp_path / "model.gguf")


def test_rope_scaling_is_refused_because_it_would_be_lost(write):
    with pytest.raises(UsageError, match=r"position encoding \(qwen2\.rope\.scaling\.type\).*hub id"):
        load_pair(target=write(qwen2__rope__scaling__type="yarn"))


def test_an_unsupported_architecture_is_refused_before_the_weights(write, monkeypatch):
    monkeypatch.setattr(conversions.gguf, "read_weights", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(UsageError, match="'mamba', which is not supported"):
        load_pair(target=write(general__architecture="mamba"))


def test_missing_weights_are_named(write):
    with pytest.raises(UsageError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pair(target=write(leave_out="layers.1.mlp.up_proj"), dtype="float32")


def test_a_missing_library_is_named(write, monkeypatch):
    monkeypatch.setattr(conversions.gguf, "find_spec", lambda name: None if name == "accelerate" else True)
    with pytest.raises(UsageError, match=r"without accelerate.*pip install"):
        load_pair(target=write())


def test_a_transformers_version_that_misreads_the_tokenizer_is_refused(write, monkeypatch):
    monkeypatch.setattr(conversions.gguf, "version", lambda name: "5.17.0")
    assert load_pair(target=write(), dtype="float32").tokenizer is not None
    with pytest.raises(UsageError, match=r"transformers 5\.17\.0 misreads .*transformers>=5\.18"):
        load_pair(target=write(name="other.gguf", tokenizer__ggml__pre="llama-bpe"), dtype="float32")
